"""SoRA: a LoRA whose ranks have gates, which a proximal step after each of the optimizer's drives to exactly zero.

    y   = W0 x + (alpha / r) * B (g * (A x))
    g_j <- sign(g_j) max(|g_j| - threshold, 0)        after every optimizer step

Source: "Sparse Low-rank Adaptation of Pre-trained Language Models" (EMNLP 2023), equations 6 to 9, and its code: g from
N(0, 1), A Kaiming-uniform, B zero, r = 8, alpha = 16. As there, the threshold is not multiplied by the learning rate.
Ranks whose gate is zero are left out of what is merged or exported. Deviations: the gates have the run's learning rate
and not an optimizer of their own; the code's further L1 loss and the unfrozen layer norms are not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.numerics import at_least_float32
from more_ds.tuners.low_rank import LowRank, LowRankConfig
from more_ds.tuners.update_model import UpdateModel, register


class SoRA(LowRank):
    """One map: A, B and the gates g, (r,)."""

    def __init__(self, config: SoRAConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.g = nn.Parameter(torch.empty(config.r))

    def reset(self) -> None:
        """A Kaiming-uniform (a = sqrt 5), B zero, g from N(0, 1)."""
        super().reset()
        nn.init.normal_(self.g)

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        return self.up(self.down(x) * self.g)

    def proximal(self, g: Tensor) -> Tensor:
        """The gates after the proximal step, from those before it."""
        return torch.sign(g) * (g.abs() - self.config.threshold).clamp(min=0)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        a, b = self.matrices()
        # A LoRA needs one rank at least, if all gates are zero.
        used = self.g.nonzero().squeeze(1) if self.g.any() else torch.zeros(1, dtype=torch.long, device=a.device)
        return a[used], b[:, used] * at_least_float32(self.g)[used]


@dataclass
class SoRAConfig(LowRankConfig):
    """Configuration of SoRA."""

    method = "sora"
    update_class = SoRA

    lora_alpha: float = field(default=16, metadata={"help": "The update is multiplied by lora_alpha / r."})
    threshold: float = field(default=3e-4, metadata={"help": "What a step takes from every gate's size (lambda_2)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise ValueError(f"SoRAConfig.threshold is {self.threshold}; it must be 0 or more")


class SoRAModel(UpdateModel):
    """A model adapted by SoRA."""

    prefix = "sora_"


register("sora", SoRAConfig, SoRAModel)
