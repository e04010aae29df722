"""What updates of low rank have in common: A, B, a scale and dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32
from more_ds.tuners.update import Update, UpdateConfig


@dataclass
class LowRankConfig(UpdateConfig):
    """Options of a method whose update is built of matrices of low rank."""

    r: int = field(default=8, metadata={"help": "Rank of A."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is multiplied by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, in training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("r")


class LowRank(Update):
    """(alpha / r) B A dropout(x), and what methods make of it."""

    def __init__(self, config: Any, in_features: int, out_features: int, heads: int = 1) -> None:
        """A, (r, in), and `heads` matrices B side by side, (out, heads * r)."""
        super().__init__(config, in_features, out_features)
        self.A = nn.Parameter(torch.empty(config.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, heads * config.r))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.lora_alpha / config.r

    def reset(self) -> None:
        """A Kaiming-uniform (a = sqrt 5), B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def down(self, x: Tensor) -> Tensor:
        """A dropout(x), (batch, ..., r)."""
        return F.linear(self.dropout(x), self.A)

    def up(self, hidden: Tensor) -> Tensor:
        """(alpha / r) B hidden, (batch, ..., out)."""
        return F.linear(hidden * self.scaling, self.B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A, and B times alpha / r, in float32."""
        return at_least_float32(self.A), at_least_float32(self.B) * self.scaling


def mixed(hidden: Tensor, weights: Tensor) -> Tensor:
    """What goes into matrices B that stand side by side, so that they act as their mixture.

    Args:
        hidden: (batch, ..., r).
        weights: (batch, ..., heads) weight of every B.

    Returns:
        (batch, ..., heads * r)
    """
    return (weights.to(hidden.dtype).unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2)


def of_rows(values: Tensor, x: Tensor) -> Tensor:
    """(batch, k) values in a shape that (batch, ..., k) can be multiplied with."""
    return values.view(len(values), *[1] * (x.dim() - 2), values.shape[-1])
