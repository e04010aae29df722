"""Experts whose weights are stacked: one module holds them as (experts, ., .) parameters, and no `nn.Linear`.

transformers keeps the experts of most mixtures so (Mixtral, Qwen-MoE, DeepSeek, gpt-oss). Most of these modules compute
by one contract (`transformers.integrations.moe`): forward(tokens, top_k_index, top_k_weights), with flags that say how
the weights lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

CONTRACT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
"""Flags of the modules that compute by transformers' contract."""
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Their stacked weights, in the order in which they are used; the first two exclude each other."""


@dataclass(frozen=True)
class StackedExperts:
    """The experts of one block.

    Attributes:
        name: of the module, as it is without adapters.
        module: that holds the weights.
        shapes: of the stacked weights, by their name in the module, whole also under ZeRO-3.
    """

    name: str
    module: nn.Module
    shapes: dict[str, tuple[int, ...]]

    @property
    def keys(self) -> list[str]:
        """Full names of the weights."""
        return [f"{self.name}.{weight}" for weight in self.shapes]

    @property
    def follows_contract(self) -> bool:
        """Whether the module computes by transformers' contract, so that its forward can be written out."""
        return all(hasattr(self.module, flag) for flag in CONTRACT) and set(self.shapes) <= set(WEIGHTS)


def stacked_experts(model: nn.Module) -> Iterator[StackedExperts]:
    """The stacked experts of a model, with adapters or without."""
    for name, module in model.named_modules():
        number = getattr(module, "num_experts", None)
        if not isinstance(number, int):
            continue
        shapes: dict[str, tuple[int, ...]] = {}
        for key, p in module.named_parameters(recurse=False):
            shape = tuple(getattr(p, "ds_shape", p.shape))
            # Numbers of one byte are packed in some way, with scales beside them.
            if len(shape) == 3 and shape[0] == number and p.is_floating_point() and p.itemsize > 1:
                shapes[key] = shape
        if shapes:
            yield StackedExperts(name.replace(".base_layer", ""), module, shapes)


def in_words(experts: Iterable[StackedExperts]) -> str:
    """How many they are, and how large."""
    found = list(experts)
    size = sum(prod(shape) for own in found for shape in own.shapes.values())
    return f"{len(found)} module{'s' * (len(found) != 1)} of stacked experts, {size:,} values"


def is_named(key: str, names: Iterable[str]) -> bool:
    """Whether a weight is among names, which may lack their beginnings, as in PEFT."""
    return any(key == name or key.endswith(f".{name}") for name in names)
