"""The optimizers that `--optim` chooses among, and the two moments that they keep of every trained value.

All are AdamW. torch keeps its moments in float32. bitsandbytes (Dettmers et al., 2022, "8-bit optimizers via block-wise
quantization") keeps them as codes of 8 bits, with a scale for each block of 256 values, and in float32 where a tensor
has less than 4,096; its paged forms keep them in memory that the GPU and the host share, from which they make way when
a batch needs the room. It also decays weights and adds epsilon as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"
SCALES = tuple(name + SCALE for name in MOMENTS)
"""The scale of the block that a value lies in, for each value; with it the codes come out again to the bit."""

BITSANDBYTES: Mapping[str, type[Optimizer2State]] = {
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "paged_adamw_32bit": PagedAdamW,
}
BLOCK = 256
"""Values that share a scale."""


def is_paged(name: str) -> bool:
    """Whether an optimizer keeps its moments in memory that the GPU and the host share."""
    return name.startswith("paged_")


def make(name: str, groups: Sequence[Mapping[str, Any]], *, fused: bool, **options: Any) -> torch.optim.Optimizer:
    """An optimizer.

    Args:
        name: of `RunConfig.optim`.
        groups: of parameters, as torch takes them.
        fused: compute torch's in one kernel.
        options: `lr`, `betas` and `eps`.
    """
    if name in BITSANDBYTES:
        return BITSANDBYTES[name](list(groups), **options)
    return torch.optim.AdamW([dict(group) for group in groups], fused=fused, **options)


class TorchMoments:
    """What torch's AdamW keeps.

    Attributes:
        kinds: of the values, in the order in which they are to be written.
    """

    kinds: tuple[str, ...] = MOMENTS

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Look into an optimizer."""
        self.optimizer: Any = optimizer

    def step(self, owner: Tensor) -> int:
        """Steps that the optimizer has counted for a tensor that it moves."""
        return int(self._state(owner).get("step", 0))

    def begin(self, owner: Tensor, step: int) -> None:
        """Set the number of steps, and make room for the moments where there is none yet."""
        state = self.optimizer.state[owner]
        if not state:
            on_device = self.optimizer.param_groups[0].get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
            state.update({kind: torch.zeros_like(owner, requires_grad=False) for kind in self.kinds})
        state["step"].fill_(step)

    def read(self, owner: Tensor, kind: str) -> Tensor | None:
        """All values of a kind of one tensor, (values,) float32; None before the first step."""
        state = self._state(owner)
        return state[kind].view(-1) if state else None

    def write(self, owner: Tensor, kind: str, values: Tensor) -> None:
        """Give a tensor that has room for them all values of a kind, shaped as `read` returns them."""
        self.optimizer.state[owner][kind].view(-1).copy_(values)

    def _state(self, owner: Tensor) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.optimizer.state.get(owner, {})
        return state


class BitsAndBytesMoments(TorchMoments):
    """What AdamW of bitsandbytes keeps; paged tensors look as if they were the CPU's."""

    def __init__(self, optimizer: Optimizer2State) -> None:
        """Look into an optimizer."""
        super().__init__(optimizer)
        # The scales first: what a value's code is depends on them.
        in_codes = self.optimizer.args.optim_bits == 8
        self.kinds = (*SCALES, *MOMENTS) if in_codes else MOMENTS

    def begin(self, owner: Tensor, step: int) -> None:
        """As in `TorchMoments`."""
        if not self._state(owner):
            group = self.optimizer.param_groups[0]
            # It looks a tensor's options up by its place in a group, and ZeRO-3 fills the groups only for a step.
            held, group["params"] = group["params"], [owner]
            self.optimizer.init_state(group, owner, 0, 0)
            group["params"] = held
        self.optimizer.state[owner]["step"] = step

    def read(self, owner: Tensor, kind: str) -> Tensor | None:
        """As in `TorchMoments`; the scale of a value in float32 is its own size."""
        state, moment = self._state(owner), kind.removesuffix(SCALE)
        if not state:
            return None
        number = 1 + MOMENTS.index(moment)
        stored = state[f"state{number}"].to(owner.device).view(-1)
        if stored.dtype == torch.float32:
            return stored.abs() if kind != moment else stored
        scales = self._spread(state, number, len(stored))
        # A block of zeros has any codes; the sum makes its negative zeros zero.
        return scales if kind != moment else state[f"qmap{number}"][stored.long()] * scales + 0.0

    def write(self, owner: Tensor, kind: str, values: Tensor) -> None:
        """As in `TorchMoments`; values that were of other blocks are rounded again, below the largest of their scales.

        Where the blocks are the same, so are scales and codes, to the bit.
        """
        state, moment = self.optimizer.state[owner], kind.removesuffix(SCALE)
        number = 1 + MOMENTS.index(moment)
        stored = state[f"state{number}"].view(-1)
        if stored.dtype == torch.float32:
            if kind == moment:
                stored.copy_(values)
        elif kind != moment:
            padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
            state[f"absmax{number}"].copy_(padded.view(-1, BLOCK).amax(1))
        else:
            scales, levels = self._spread(state, number, len(stored)), state[f"qmap{number}"]
            parts = torch.where(scales > 0, values / scales, 0.0)
            stored.copy_(torch.bucketize(parts, (levels[1:] + levels[:-1]) / 2))

    def _spread(self, state: Mapping[str, Any], number: int, size: int) -> Tensor:
        return state[f"absmax{number}"].repeat_interleave(BLOCK)[:size]


def moments_of(optimizer: torch.optim.Optimizer) -> TorchMoments:
    """The moments of an optimizer that `make` has made."""
    return BitsAndBytesMoments(optimizer) if isinstance(optimizer, Optimizer2State) else TorchMoments(optimizer)
