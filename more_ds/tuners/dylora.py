"""DyLoRA: a LoRA that is trained to work when cut to any rank.

    b ~ uniform over 1 .. r, drawn for every batch and the same in all maps
    y = W0 x + (alpha / b) * B[:, :b] A[:b] x

Source: "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low-Rank Adaptation" (EACL
2023) and its code. With `frozen`, the components below b are used and not trained, so that a batch trains component b
alone. After training `rank` chooses where it is cut; None: nowhere. Deviations: the published code multiplies A and B
by sqrt(r / b) each, which with alpha / r is the same product; ranks count from 1. MoRE is this with a rank per task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.tuners.low_rank import LowRank, LowRankConfig
from more_ds.tuners.update_model import UpdateModel, register


class Cut(nn.Module):
    """Called, what each component is multiplied by, (r,): r / b up to component b, then zero."""

    def __init__(self, config: DyLoraConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self) -> Tensor:
        r = self.config.r
        # Drawn on the CPU, which every device and rank with the same seed can repeat.
        b = int(torch.randint(1, r + 1, ())) if self.training else self.config.rank or r
        return (torch.arange(r) < b).double() * (r / b)


class DyLora(LowRank):
    """One map: A and B."""

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        cut = shared.to(x.device, x.dtype)
        hidden = self.down(x)
        if not (self.config.frozen and self.training):
            return self.up(hidden * cut)
        # The last component that is used is trained; gradients of the others are zero, not missing.
        last = torch.zeros_like(cut).scatter_(0, cut.count_nonzero().unsqueeze(0) - 1, 1.0)
        hidden = torch.where(last.bool(), hidden, hidden.detach())
        frozen = torch.where(last.bool(), self.B, self.B.detach())
        return nn.functional.linear(hidden * cut * self.scaling, frozen)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        a, b = self.matrices()
        cut = Cut(self.config).eval()()
        used = cut.nonzero().squeeze(1).to(a.device)
        return a[used], b[:, used] * float(cut.max())


@dataclass
class DyLoraConfig(LowRankConfig):
    """Configuration of DyLoRA."""

    method = "dylora"
    update_class = DyLora

    frozen: bool = field(default=False, metadata={"help": "Train only the last of the components that a batch uses."})
    rank: int | None = field(default=None, metadata={"help": "Components used after training; None: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and not 1 <= self.rank <= self.r:
            raise ValueError(f"DyLoraConfig.rank is {self.rank}; it must be from 1 to r={self.r}")

    def shared_module(self, widths: dict[str, int]) -> nn.Module:
        return Cut(self)


class DyLoraModel(UpdateModel):
    """A model adapted by DyLoRA."""

    prefix = "dylora_"


register("dylora", DyLoraConfig, DyLoraModel)
