"""Which modules of a model are linear maps, also where a quantiser has put modules of its own in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL = "all-linear"
SETS = ("attention", "ffn", "attention+ffn")
"""Words for the maps of a model's blocks; LoRA's paper has the first, MoRE's the last."""
ATTENTION = re.compile("attn|attention", re.IGNORECASE)
TARGETS = "Names, a regular expression, `all-linear`, `attention`, `ffn` or `attention+ffn`."
"""What `target_modules` may be."""
SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
"""Names under which quantised linear maps tell their widths: GPTQ's and AWQ's, and older ones'."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps its last dimension linearly: an update of its output needs nothing else of it."""
    return isinstance(module, (nn.Linear, Conv1D)) or any(all(hasattr(module, n) for n in names) for names in SIZES)


def name_targets(config: Any, model: Any) -> None:
    """Write names in the place of a word for several maps in a PEFT configuration.

    `attention`, `ffn` and `attention+ffn` are the linear maps of a model's numbered blocks: those of modules that are
    called attention, the others, and all of them. `all-linear` is PEFT's own, which means `nn.Linear`, whose subclasses
    those of bitsandbytes are, and GPT-2's `Conv1D`: in a GPTQ or AWQ model that is nothing, or the output's map alone,
    and names are written there; for other models nothing is changed.

    Raises:
        ValueError: the model has no such maps.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets not in (ALL, *SETS):
        return
    maps = dict(_maps(model))
    if targets == ALL:
        if all(isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) for module in maps.values()):
            return
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        config.target_modules = {name for name, module in maps.items() if module is not head}
        return
    blocks = {name for name in maps if any(part.isdigit() for part in name.split("."))}
    attention = {name for name in blocks if ATTENTION.search(name.rpartition(".")[0])}
    config.target_modules = {"attention": attention, "ffn": blocks - attention, "attention+ffn": blocks}[targets]
    if not config.target_modules:
        raise ValueError(f"target_modules is {targets}, and the model has no such maps; give names, or {ALL}")


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear maps by name, adapted ones as one."""
    adapted = "\n"
    for name, module in model.named_modules():
        if not name.startswith(adapted) and (isinstance(module, BaseTunerLayer) or is_linear(module)):
            adapted = f"{name}."
            yield name, module
