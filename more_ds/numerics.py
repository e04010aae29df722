"""Number formats."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is float64: what must not be rounded to a half-precision type."""
    return x if x.dtype == torch.float64 else x.float()
