"""Where an adapted map sits in its model, read from its name."""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?:(encoder|decoder)\.)?(?:layers|block|h|layer)\.(\d+)\.(?:layer\.\d+\.)?(.+)$")


class Place(NamedTuple):
    """Where a map is.

    Attributes:
        layer: e.g. `layer 3` or `decoder layer 3`; the map's name where it is in no layer.
        module: its name in the layer, e.g. `self_attn.q_proj`.
    """

    layer: str
    module: str


def place_of(name: str) -> Place:
    """The layer of a map, and its name there; LLaMA, GPT-2, T5, BART and BERT number their layers alike enough."""
    found = _LAYER.search(name)
    if found is None:
        return Place(name, name.rsplit(".", 1)[-1])
    stack, number, module = found.groups()
    return Place(f"{stack} layer {number}" if stack else f"layer {number}", module)
