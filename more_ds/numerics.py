"""Number formats."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is float64: what must not be rounded to a half-precision type."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A region of exact types on the device of `like`; the meta device, which computes nothing, has no autocast."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def autocasts(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`."""
    return not like.is_meta and torch.is_autocast_enabled(like.device.type)
