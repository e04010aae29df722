"""The two large products of a frozen map with a low-rank update, by torch or by a kernel of their own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from more_ds import log


class Products(NamedTuple):
    """How `SharedInput` multiplies.

    Attributes:
        outputs: x (n, in), W (out, in), bias (out,) or None, z (n, r) and B (out, r) to x W^T + bias + z B^T, (n, out).
        inputs: dy (n, out), W (out, in), dz (n, r) and A (r, in) to dy W + dz A, (n, in).
    """

    outputs: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    inputs: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    return y.addmm_(z, b.T)


def _inputs(dy: Tensor, weight: Tensor, dz: Tensor, a: Tensor) -> Tensor:
    return (dz @ a).addmm_(dy, weight)


TORCH = Products(_outputs, _inputs)
"""A base product, and the update added in place in a second pass over its output."""


@functools.cache
def triton_products(device: torch.device, dtype: torch.dtype) -> Products:
    """The kernel that adds the update while the base's output is still on the chip; `TORCH` where it does not serve.

    Before it is used it must give what torch gives on this device. What stands in its way is said once.
    """
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed"
    elif device.type != "cuda" and not _interprets():
        why = f"the model is on {device.type}, and Triton's kernels run on CUDA"
    elif dtype == torch.float64:
        why = "it multiplies in bfloat16, float16 and float32"
    else:
        from more_ds.tuners.more import triton_products as own

        found = Products(own.outputs, own.inputs)
        why = _difference(found, device, dtype)
        if not why:
            return found
    log.say(f"backend triton: {why}; the maps use torch's products")
    return TORCH


def _interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _difference(found: Products, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel must not be used: it fails, or differs from torch by more than rounding does."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight, bias, z, b = draw(70, 48), draw(96, 48), draw(96), draw(8, 70).T, draw(96, 8)
    dy, a = draw(70, 96), draw(8, 48)
    try:
        ours = found.outputs(x, weight, bias, z, b), found.inputs(dy, weight, z, a)
    except Exception as error:  # whatever a compiler and a driver that do not fit each other may raise
        return f"its kernel does not run here ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    close = 1e-3 if dtype == torch.float32 else 0.5  # of values up to 40, of which half-precision types round the sums
    for own, wanted in zip(ours, (_outputs(x, weight, bias, z, b), _inputs(dy, weight, z, a)), strict=True):
        if not torch.allclose(own, wanted, rtol=0, atol=close):
            return "its kernel does not give what torch gives here"
    return ""
