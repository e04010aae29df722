"""SMoRA: every rank of a LoRA is an expert, and every token uses the k ranks that its router prefers.

    p   = softmax(W_r x)                                                       (r,) in float32
    G_j = p_j if p_j + b_j is among the k highest, else 0
    y   = W0 x + (alpha / k) * B (G * (A x))
    b_j grows by `balance_rate` after a step in which rank j was used less than the mean, and falls where more.

Source: "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning" (arXiv
2501.15103); its code was not at hand, and what follows is our reading. The bias takes the place of a balance loss: it
decides which ranks are used and not by how much, has no gradient, and is moved by the ranks' use over all processes.
The paper prints no scale; ours is that of a LoRA of rank k. The ranks that are not used are multiplied by zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast
from more_ds.tuners.low_rank import LowRank, LowRankConfig
from more_ds.tuners.update_model import UpdateModel, register


class SMoRA(LowRank):
    """One map: A, B, the router W_r, (r, in), and two counts for every rank.

    `moves` is the bias in units of `balance_rate`, and `used` how often the rank was used since the last step: whole
    numbers, because a model that is cast to bfloat16 casts its buffers too, and these would stop counting.
    """

    moves: Tensor
    used: Tensor

    def __init__(self, config: SMoRAConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.router = nn.Parameter(torch.empty(config.r, in_features))
        self.register_buffer("moves", torch.zeros(config.r, dtype=torch.long))
        self.register_buffer("used", torch.zeros(config.r, dtype=torch.long), persistent=False)
        self.scaling = config.lora_alpha / config.top_k

    def reset(self) -> None:
        """A and the router Kaiming-uniform (a = sqrt 5), B zero."""
        super().reset()
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        with without_autocast(x):
            p = torch.softmax(F.linear(at_least_float32(x), at_least_float32(self.router)), dim=-1)
        chosen = (p.detach() + self.config.balance_rate * self.moves).topk(self.config.top_k, dim=-1).indices
        mask = torch.zeros_like(p).scatter_(-1, chosen, 1.0)
        if self.training:
            # A recomputation under checkpointing counts everything twice, which the signs do not feel.
            self.used += mask.flatten(0, -2).sum(0).long()
        hidden = self.down(x)
        return self.up(hidden * (p * mask).to(hidden.dtype))

    @torch.no_grad()
    def balance(self, used: Tensor) -> None:
        """Move the bias towards the ranks that were used too little: `used`, (r,), over all processes."""
        self.moves += torch.sign(used.sum() - used * len(used))
        self.used.zero_()


@dataclass
class SMoRAConfig(LowRankConfig):
    """Configuration of SMoRA."""

    method = "smora"
    update_class = SMoRA

    r: int = field(default=64, metadata={"help": "Number of ranks, each an expert."})
    top_k: int = field(default=8, metadata={"help": "Number of ranks that a token uses."})
    balance_rate: float = field(default=1e-3, metadata={"help": "How far a step moves the bias; 0: not at all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("top_k")
        if self.top_k > self.r:
            raise ValueError(f"SMoRAConfig.top_k={self.top_k} is more than r={self.r}")


class SMoRAModel(UpdateModel):
    """A model adapted by SMoRA."""

    prefix = "smora_"


register("smora", SMoRAConfig, SMoRAModel)
