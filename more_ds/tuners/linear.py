"""Which modules of a model are linear maps, also where a quantiser has put modules of its own in their place."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL = "all-linear"
SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
"""Names under which quantised linear maps tell their widths: GPTQ's and AWQ's, and older ones'."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps its last dimension linearly: an update of its output needs nothing else of it."""
    return isinstance(module, (nn.Linear, Conv1D)) or any(all(hasattr(module, n) for n in names) for names in SIZES)


def name_all_linear(config: Any, model: Any) -> None:
    """Write names in the place of `all-linear` in a PEFT configuration, for a model with quantised maps.

    PEFT means by it `nn.Linear`, whose subclasses those of bitsandbytes are, and GPT-2's `Conv1D`; in a GPTQ or AWQ
    model that is nothing, or the output's map alone. For other models nothing is changed.
    """
    if getattr(config, "target_modules", None) != ALL:
        return
    maps = {name: module for name, module in model.named_modules() if is_linear(module)}
    if any(isinstance(module, BaseTunerLayer) for module in maps.values()):
        return  # PEFT knows the adapted maps of a model that has an adapter already
    if all(isinstance(module, (nn.Linear, Conv1D)) for module in maps.values()):
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config.target_modules = {name for name, module in maps.items() if module is not head}
