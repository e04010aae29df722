"""MOELoRA: the rank of a LoRA is cut into experts, and a gate on the task weighs them.

    w_t = softmax(W_g e_t)                                                       (n,) in float32
    y   = W0 x + (alpha / r) * sum_i w_ti B_i A_i x          A_i is (r / n, in), B_i (out, r / n)

Source: "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications" (SIGIR 2024) and its
code (class `mmoeloraS`): one task table of width 64 and one gate for the whole model. Alpha is divided by the whole r.
`gate_per_map` is the layout of the MoRE paper's Table 6, with a table and a gate in every map (`task_dim` 768 there).
Deviations: tasks count from 0 and belong to examples, so that the table has T rows and not T + 1; dropout is drawn once
for all experts; the gates that the published layers make and never use are not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.numerics import at_least_float32, without_autocast
from more_ds.tuners.low_rank import LowRank, LowRankConfig, of_rows
from more_ds.tuners.update import TasksConfig
from more_ds.tuners.update_model import UpdateModel, register


class TaskGate(nn.Module):
    """Task embeddings and a gate: called, the weights of the experts for every task, (T, n) float32."""

    def __init__(self, config: MoeLoraConfig) -> None:
        """Make them with values."""
        super().__init__()
        self.task = nn.Parameter(torch.empty(config.num_tasks, config.task_dim))
        self.gate = nn.Parameter(torch.empty(config.experts, config.task_dim))
        if not self.task.is_meta:
            reset_gate(self.task, self.gate)

    def forward(self) -> Tensor:
        return expert_weights(self.task, self.gate)


def reset_gate(task: Tensor, gate: Tensor) -> None:
    """Embeddings from N(0, 1), the gate as torch initialises a linear map."""
    nn.init.normal_(task)
    nn.init.kaiming_uniform_(gate, a=math.sqrt(5))


def expert_weights(task: Tensor, gate: Tensor) -> Tensor:
    """softmax(W_g e_t) of every task, (T, n) float32, from (T, h) and (n, h)."""
    with without_autocast(task):
        return torch.softmax(at_least_float32(task) @ at_least_float32(gate).T, dim=-1)


class MoeLora(LowRank):
    """One map: A and B, and a gate of its own if the model has none."""

    def __init__(self, config: MoeLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        if config.gate_per_map:
            self.task = nn.Parameter(torch.empty(config.num_tasks, config.task_dim))
            self.gate = nn.Parameter(torch.empty(config.experts, config.task_dim))

    def reset(self) -> None:
        """A from N(0, 0.01^2), B zero."""
        nn.init.normal_(self.A, std=0.01)
        nn.init.zeros_(self.B)
        if self.config.gate_per_map:
            reset_gate(self.task, self.gate)

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        hidden = self.down(x)
        weights = self._weights(shared).index_select(0, tasks).to(hidden.dtype)
        return self.up(hidden * of_rows(weights, hidden))

    def _weights(self, shared: Any) -> Tensor:
        """The weight of every component for every task, (T, r)."""
        weights: Tensor = expert_weights(self.task, self.gate) if self.config.gate_per_map else shared
        return weights.repeat_interleave(self.config.r // self.config.experts, dim=-1)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        a, b = self.matrices()
        return a, b * self._weights(shared)[task]


@dataclass
class MoeLoraConfig(TasksConfig, LowRankConfig):
    """Configuration of MOELoRA."""

    method = "moelora"
    update_class = MoeLora

    r: int = field(default=16, metadata={"help": "Rank of all experts together."})
    experts: int = field(default=8, metadata={"help": "Number n of experts; it must divide r."})
    task_dim: int = field(default=64, metadata={"help": "Width of the task embeddings."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of A, in training."})
    gate_per_map: bool = field(default=False, metadata={"help": "A task table and a gate in every adapted map."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("experts", "task_dim")
        if self.r % self.experts:
            raise ValueError(f"MoeLoraConfig.r={self.r} is not a multiple of experts={self.experts}")

    def shared_module(self, widths: dict[str, int]) -> nn.Module | None:
        return None if self.gate_per_map else TaskGate(self)


class MoeLoraModel(UpdateModel):
    """A model adapted by MOELoRA."""

    prefix = "moelora_"
    routes_by_task = True


register("moelora", MoeLoraConfig, MoeLoraModel)
