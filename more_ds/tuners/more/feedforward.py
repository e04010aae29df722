"""Gated feed-forward networks, act(gate x) * (up x) into down, which keep two tensors instead of four.

The activations of these networks are most of what a step with a frozen base holds.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from more_ds.tuners.more.layer import MoreLinear


def save_memory(model: nn.Module) -> None:
    """Let the adapted networks of a model that compute what LLaMA's do keep their factors alone."""
    for module in model.modules():
        if _is_gated(module) and isinstance(module.down_proj, MoreLinear):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _is_gated(module: nn.Module) -> bool:
    """Whether a module's forward is LLaMA's: most models have a class of their own with the same code."""
    code = getattr(type(module).forward, "__code__", None)
    known = LlamaMLP.forward.__code__
    return code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)


def _forward(module: Any, x: Tensor) -> Tensor:
    down = module.down_proj
    step = down.context.step if isinstance(down, MoreLinear) else None
    if step is None or step.products is None:
        result: Tensor = type(module).forward(module, x)
    else:
        result = down(step.product(module.act_fn, module.gate_proj(x), module.up_proj(x)))
    return result
