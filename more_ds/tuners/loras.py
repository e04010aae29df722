"""Finished LoRAs inside of a model, side by side in every map: what the ways to weigh them have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.update import Update, UpdateLinear
from more_ds.tuners.update_model import UpdateModel


class Loras(Update):
    """The LoRAs of one map.

    Attributes:
        A: (sum of ranks, in).
        B: (out, sum of ranks), with alpha / r in it.
    """

    A: Tensor
    B: Tensor
    owner: Tensor

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        """Make room for LoRAs of `config.ranks`."""
        super().__init__(config, in_features, out_features)
        total = sum(config.ranks)
        self.register_buffer("A", torch.zeros(total, in_features))
        self.register_buffer("B", torch.zeros(out_features, total))
        owner = [i for i, rank in enumerate(config.ranks) for _ in range(rank)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)

    def reset(self) -> None:
        """Nothing: the LoRAs are put in."""

    @torch.no_grad()
    def put(self, index: int, a: Tensor, b: Tensor) -> None:
        """Put LoRA number `index` in its place: A, (rank, in), and B, (out, rank); a lower rank leaves zeros."""
        start = sum(self.config.ranks[:index])
        self.A[start : start + len(a)] = a.to(self.A)
        self.B[:, start : start + len(a)] = b.to(self.B)

    def weighed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of the LoRAs' updates.

        Args:
            x: (batch, ..., in).
            weights: (batch, ..., N), of every LoRA.

        Returns:
            (batch, ..., out)
        """
        return F.linear(F.linear(x, self.A) * weights.index_select(-1, self.owner).to(self.A.dtype), self.B)


class LorasModel(UpdateModel):
    """A model whose adapted maps have finished LoRAs."""

    def put(self, index: int, factors: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str = "default") -> None:
        """Put LoRA number `index` in its place.

        Args:
            index: its number.
            factors: A, (rank, in), and B, (out, rank), by the names of the maps; maps without them get no update.
            adapter_name: PEFT's.

        Raises:
            ValueError: a map is not adapted, or of another shape.
        """
        layers = {layer.key: layer for layer in self._layers(adapter_name)}
        for name, (a, b) in factors.items():
            layer = layers.get(name)
            if layer is None or (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
                size = "not adapted" if layer is None else f"{layer.out_features} x {layer.in_features}"
                raise ValueError(f"the LoRA's update of {name} is {b.shape[0]} x {a.shape[1]}, and the map is {size}")
            layer.update[adapter_name].put(index, a, b)

    def _layers(self, adapter_name: str) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, UpdateLinear) and adapter_name in m.update]
