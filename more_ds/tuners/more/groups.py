"""Maps of one adapter that read one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.context import TaskContext, repeat_rows
from more_ds.tuners.more.functions import GatedProduct, SharedInput, answer_few
from more_ds.tuners.more.products import TORCH, Products

if TYPE_CHECKING:
    from more_ds.tuners.more.layer import MoreLinear

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"), ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"), ("w1", "w3"),
)  # fmt: skip
"""Names of neighbouring maps that read one tensor, in the order in which models call them."""

FEW = 64
"""Tokens of a batch up to which a product with them as rows is the faster one: those of a step of decoding."""

Part = Tensor | tuple[Tensor, Tensor]
"""The output of a map, or (A x) * v and B, which are still to be added to the base's output."""


class Group:
    """Maps that read one tensor, run together when the first of them is called."""

    def __init__(self, maps: Sequence[MoreLinear], name: str, context: TaskContext) -> None:
        """Group maps that have the adapter `name`, in the order in which the model calls them."""
        self.maps, self.name, self.context = list(maps), name, context
        self.config, self.role = maps[0].configs[name], maps[0].role
        self._a = [layer.more_A[name] for layer in maps]
        self._b = [layer.more_B[name] for layer in maps]
        self._bases: list[nn.Module] = [layer.get_base_layer() for layer in maps]
        plain = [
            type(base) is nn.Linear and layer.base_layer is base for layer, base in zip(maps, self._bases, strict=True)
        ]
        self._is_plain = all(plain)

    @property
    def contrasts(self) -> bool:
        """Whether the maps take part in the contrastive loss."""
        return self.maps[0]._contrasts(self.config)

    def run(
        self, x: Tensor, v: Tensor, pools: bool, products: Products | None, product: GatedProduct | None = None
    ) -> tuple[list[Part], Tensor | None]:
        """Run the maps.

        Args:
            x: (batch, ..., in).
            v: (examples or 1, maps * r) what each example's A x is multiplied by.
            pools: whether x is to be pooled.
            products: how the function with the hand-written gradient multiplies, where the base layers allow it; None:
                plain operations.
            product: what x was made of, where that is known.

        Returns:
            A part for every map, for `finish`, and the pooled x, (examples, in); each row stands for itself where x is
            flattened.
        """
        first = self.maps[0]
        p = self.config.lora_dropout if first.training else 0.0
        weights = [_weight(module) for module in self._a]
        a = weights[0] if len(weights) == 1 else torch.cat(weights)
        entered = first._cast_input_dtype(x, a.dtype)
        v = repeat_rows(v, x.shape[0]) if v.shape[0] > 1 else v
        pooling = self.context.pool_weights(entered, self.role, self.config.pooling) if pools and x.dim() == 3 else None
        bs = [_weight(module) for module in self._b]
        if products is not None and self._is_plain and self._may_pass_by(x, a):
            bases = [base._parameters for base in self._bases]
            if products is TORCH and not torch.is_grad_enabled() and not first.training and not pools and _few(x):
                return [*answer_few(x, a, v.to(a.dtype), bases, bs)], None
            parameters = [*(base["weight"] for base in bases), *(base["bias"] for base in bases), *bs]
            parts = list(SharedInput.apply(x, products, product, p, a, v.to(a.dtype), pooling, len(bs), *parameters))
            pooled = parts.pop() if pooling is not None else None
        else:
            z = F.linear(first._cast_input_dtype(F.dropout(x, p), a.dtype) if p > 0 else entered, a)
            scaled = z * v.view(v.shape[0], *[1] * (x.dim() - 2), -1).to(z.dtype)
            parts = list(zip(scaled.chunk(len(bs), dim=-1), bs, strict=True))
            pooled = None if pooling is None else torch.bmm(pooling, entered).flatten(0, 1)
        return parts, entered if pools and pooling is None else pooled

    def _may_pass_by(self, x: Tensor, a: Tensor) -> bool:
        """Whether the base layers may be used without calling them: frozen, in one type with the update, not hooked."""
        for base in self._bases:
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            assert weight is not None
            if base._forward_hooks or base._forward_pre_hooks or weight.requires_grad:
                return False
            if not weight.dtype == x.dtype == a.dtype or (bias is not None and bias.requires_grad):
                return False
        return True


def finish(layer: MoreLinear, x: Tensor, part: Part) -> Tensor:
    """The output of a map from its part."""
    if isinstance(part, Tensor):
        return part
    result: Tensor = layer.base_layer(x)
    return result + F.linear(*part).to(result.dtype)


def grouped(layers: Sequence[MoreLinear]) -> list[list[MoreLinear]]:
    """Neighbours that read one tensor, in the order in which they are called; the others alone."""
    by_key = {layer.key: layer for layer in layers}
    groups: list[list[MoreLinear]] = []
    seen: set[str] = set()
    for layer in layers:
        if layer.key in seen:
            continue
        above, _, own = layer.key.rpartition(".")
        family = next((names for names in SHARED_INPUT if own in names), (own,))
        keys = [f"{above}.{name}" if above else name for name in family]
        alike = [
            by_key[key] for key in keys
            if key in by_key and by_key[key].role == layer.role and by_key[key].in_features == layer.in_features
        ]  # fmt: skip
        groups.append(alike)
        seen.update(member.key for member in alike)
    return groups


def _few(x: Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


def _weight(module: nn.Module) -> Tensor:
    # Not `module.weight`: through `nn.Module.__getattr__` five of them a map are felt where kernels are short.
    weight = module._parameters["weight"]
    assert weight is not None
    return weight
