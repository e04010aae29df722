"""Where the stacked weights of experts are in a base model's files: under their own names, or expert by expert.

What most files keep apart (`experts.3.w1.weight`), transformers stacks when it loads them, and takes apart again when
it saves. Its own rules are asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from more_ds.errors import UserError
from more_ds.tuners.stacked_weights import stacked_experts


@dataclass(frozen=True)
class Share:
    """What a tensor of a file holds of the update of a map.

    Attributes:
        name: of the map.
        transposed: the tensor is (..., in, out).
        expert: the tensor is that of one expert; None: of all, or of a map without experts.
        part: which of `parts` equal cuts of the outputs it has.
        parts: their number.
    """

    name: str
    transposed: bool = False
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def added(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W + B A in float32, matrix by matrix."""
        total = weight.float()
        if self.expert is not None:
            a, b = a[self.expert], b[self.expert]
        b = b.chunk(self.parts, dim=-2)[self.part]
        if a.dim() == 2:
            delta = b @ a
            return total + (delta.T if self.transposed else delta)
        if total is weight:
            total = weight.clone()
        for e in range(len(a)):
            delta = b[e] @ a[e]
            total[e] += delta.T if self.transposed else delta
        return total


def stacked_shares(model: Any, names: Set[str], keys: Iterable[str], base: Path) -> dict[str, Share]:
    """Find stacked weights in the files.

    Args:
        model: the base model, without weights.
        names: of stacked weights.
        keys: names of the tensors in the files.
        base: their folder, for messages.

    Returns:
        By the name of the tensor.

    Raises:
        UserError: a weight is not there, or lies in a way that is not known.
    """
    experts = {key: own for own in stacked_experts(model) for key in own.keys}
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = model.state_dict()
    found: dict[str, Share] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name in names and name in experts:
            transposed = bool(getattr(experts[name].module, "is_transposed", False))
            in_one = pattern is None
            found[key] = Share(name, transposed) if in_one else _of_expert(key, name, str(pattern), converters, base)
    for name in names:
        shares = [share for share in found.values() if share.name == name]
        whole: set[tuple[int | None, int]] = {(None, 0)}
        if shares and shares[0].expert is not None:
            size = experts[name].shapes[name.rpartition(".")[2]][0]
            whole = {(expert, part) for expert in range(size) for part in range(shares[0].parts)}
        if {(share.expert, share.part) for share in shares} != whole:
            raise UserError(f"the files in {base} do not hold all of '{name}'; is this the base model of the adapter?")
    return found


def _of_expert(key: str, name: str, pattern: str, converters: Iterable[WeightConverter], base: Path) -> Share:
    converter = next(one for one in converters if pattern in one.source_patterns)
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    parts = len(converter.source_patterns)
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    joined = [(MergeModulelist, 0), (Concatenate, 1)]
    if number is None or len(converter.target_patterns) != 1 or steps != joined[: 1 if parts == 1 else 2]:
        raise UserError(
            f"the files in {base} keep '{name}' in a way that cannot be merged into ('{key}'); save the base model by "
            "save_pretrained(..., save_original_format=False), or export --form lora"
        )
    return Share(name, False, int(number[1]), converter.source_patterns.index(pattern), parts)
