"""MTL-LoRA: between a shared A and a mixture of shared B's, every task has a matrix of its own.

    y = W0 x + (alpha / r) * sum_j softmax(w_t / tau)_j B_j L_t A x          L_t is (r, r), j = 1 .. n

Source: "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning" (arXiv 2410.09437) and its code: three B's that start at
zero, L_t at the identity, w Kaiming-uniform, tau = 0.1. Deviation: dropout is the usual one of LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.numerics import at_least_float32
from more_ds.tuners.low_rank import LowRank, LowRankConfig, mixed, of_rows
from more_ds.tuners.update import TasksConfig
from more_ds.tuners.update_model import UpdateModel, register


class MtlLora(LowRank):
    """One map: A, n matrices B side by side, and for every task L, (r, r), and w, (n,)."""

    def __init__(self, config: MtlLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features, config.heads)
        self.L = nn.Parameter(torch.empty(config.num_tasks, config.r, config.r))
        self.w = nn.Parameter(torch.empty(config.num_tasks, config.heads))

    def reset(self) -> None:
        """A and w Kaiming-uniform (a = sqrt 5), B zero, L the identity."""
        super().reset()
        self.L.data.copy_(torch.eye(self.config.r))
        nn.init.kaiming_uniform_(self.w, a=math.sqrt(5))

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        hidden = self.down(x)
        own = self.L.index_select(0, tasks)
        hidden = torch.bmm(hidden.flatten(1, -2) if hidden.dim() > 2 else hidden.unsqueeze(1), own.mT).view(
            hidden.shape
        )
        return self.up(mixed(hidden, of_rows(self._weights().index_select(0, tasks), hidden)))

    def _weights(self) -> Tensor:
        """The weight of every B for every task, (T, n) float32."""
        return torch.softmax(at_least_float32(self.w) / self.config.temperature, dim=-1)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        a, b = self.matrices()
        heads = b.view(len(b), self.config.heads, self.config.r)
        own = torch.einsum("n,mnr->mr", self._weights()[task], heads)
        return at_least_float32(self.L[task]) @ a, own


@dataclass
class MtlLoraConfig(TasksConfig, LowRankConfig):
    """Configuration of MTL-LoRA."""

    method = "mtl_lora"
    update_class = MtlLora

    heads: int = field(default=3, metadata={"help": "Number n of matrices B."})
    temperature: float = field(default=0.1, metadata={"help": "tau of the softmax over the B's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("heads")
        if self.temperature <= 0:
            raise ValueError(f"MtlLoraConfig.temperature is {self.temperature}; it must be positive")


class MtlLoraModel(UpdateModel):
    """A model adapted by MTL-LoRA."""

    prefix = "mtl_lora_"
    routes_by_task = True


register("mtl_lora", MtlLoraConfig, MtlLoraModel)
