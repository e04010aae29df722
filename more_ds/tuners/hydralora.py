"""HydraLoRA: one A, several B's, and a router that mixes the B's for every token.

    p = softmax(W_r x)                                                         (n,) in float32
    y = W0 x + (alpha / r) * sum_i p_i B_i A x

Source: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning" (NeurIPS 2024) and its code, whose
defaults are r = 4, alpha = 32 and four B's, on the FFN. The routing is dense, without a balance loss (in the code it is
always zero). The clustering that the paper proposes to choose n is not part of the method. Deviations: dropout is drawn
once for all B's; W_r, which the paper does not count, is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast
from more_ds.tuners.low_rank import LowRank, LowRankConfig, mixed
from more_ds.tuners.update_model import UpdateModel, register


class HydraLora(LowRank):
    """One map: A, n matrices B side by side, and the router W_r, (n, in)."""

    def __init__(self, config: HydraLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features, config.heads)
        self.router = nn.Parameter(torch.empty(config.heads, in_features))

    def reset(self) -> None:
        """A and the router Kaiming-uniform (a = sqrt 5), B zero."""
        super().reset()
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        with without_autocast(x):
            weights = torch.softmax(F.linear(at_least_float32(x), at_least_float32(self.router)), dim=-1)
        return self.up(mixed(self.down(x), weights))


@dataclass
class HydraLoraConfig(LowRankConfig):
    """Configuration of HydraLoRA."""

    method = "hydralora"
    update_class = HydraLora

    r: int = field(default=4, metadata={"help": "Rank of A."})
    heads: int = field(default=4, metadata={"help": "Number n of matrices B."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("heads")


class HydraLoraModel(UpdateModel):
    """A model adapted by HydraLoRA."""

    prefix = "hydralora_"


register("hydralora", HydraLoraConfig, HydraLoraModel)
