"""MultiLoRA: several LoRAs side by side, each with a trained scale for every output.

    y = W0 x + (alpha / r) * sum_i s_i * (B_i A_i x)          i = 1 .. n, s_i in R^out

Source: "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning" (arXiv 2311.11501); the authors published no
code. A_i and B_i are both Kaiming-uniform and s_i is zero, in the place of LoRA's zero B: the first step moves s alone.
The paper trains all linear maps with n = 3 to 5. Deviations: alpha / r is in the product, as in the implementations
that others published; the scales go into B, so that the n branches are one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32
from more_ds.tuners.low_rank import LowRankConfig
from more_ds.tuners.update import Update
from more_ds.tuners.update_model import UpdateModel, register


class MultiLora(Update):
    """n branches: A is (n * r, in), B (out, n, r) and s (out, n)."""

    def __init__(self, config: MultiLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.A = nn.Parameter(torch.empty(config.branches * config.r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, config.branches, config.r))
        self.s = nn.Parameter(torch.empty(out_features, config.branches))
        self.dropout = nn.Dropout(config.lora_dropout)

    def reset(self) -> None:
        """A_i and B_i Kaiming-uniform (a = sqrt 5), s zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        # Each B_i has r inputs, so its bound is 1 / sqrt(r); torch would count those of all branches.
        bound = 1 / math.sqrt(self.config.r)
        nn.init.uniform_(self.B, -bound, bound)
        nn.init.zeros_(self.s)

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        return F.linear(F.linear(self.dropout(x), self.A), self._scaled(self.B, self.s))

    def _scaled(self, b: Tensor, s: Tensor) -> Tensor:
        return (b * s.unsqueeze(-1)).flatten(1) * (self.config.lora_alpha / self.config.r)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        return at_least_float32(self.A), self._scaled(at_least_float32(self.B), at_least_float32(self.s))


@dataclass
class MultiLoraConfig(LowRankConfig):
    """Configuration of MultiLoRA."""

    method = "multilora"
    update_class = MultiLora

    branches: int = field(default=3, metadata={"help": "Number n of LoRAs side by side, each of rank r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("branches")


class MultiLoraModel(UpdateModel):
    """A model adapted by MultiLoRA."""

    prefix = "multilora_"


register("multilora", MultiLoraConfig, MultiLoraModel)
