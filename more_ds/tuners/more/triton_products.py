"""A matrix product with a low-rank update in its epilogue, for CUDA.

y = x W^T + bias + z B^T in one pass: the tile of y is still in registers when z B^T, one step of the inner loop for any
rank that fits a block, is added to it. Written and read once, where the base product and an `addmm_` after it write y,
read it, and write it again. The idea is that of LoRAFusion (arXiv 2510.00206); the kernel is the blocked product of
Triton's tutorials with one step more.

Sums are kept in float32; float32 inputs are multiplied in TF32 where torch is allowed to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs


def outputs(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    """x (n, in), W (out, in), bias (out,) or None, z (n, r) and B (out, r) to x W^T + bias + z B^T, (n, out)."""
    return _product(x, weight.T, bias, z, b.T)


def inputs(dy: Tensor, weight: Tensor, dz: Tensor, a: Tensor) -> Tensor:
    """dy (n, out), W (out, in), dz (n, r) and A (r, in) to dy W + dz A, (n, in)."""
    return _product(dy, weight, None, dz, a)


def _product(left: Tensor, right: Tensor, bias: Tensor | None, thin: Tensor, wide: Tensor) -> Tensor:
    """left (m, k) times right (k, n), plus bias (n,), plus thin (m, r) times wide (r, n)."""
    (m, k), (_, n), r = left.shape, right.shape, thin.shape[1]
    y = torch.empty(m, n, dtype=left.dtype, device=left.device)

    def grid(chosen: Any) -> tuple[int]:
        return (triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]),)

    with torch.cuda.device(left.device) if left.is_cuda else torch.no_grad():
        _kernel[grid](
            left, right, y if bias is None else bias, thin, wide, y, m, n, k, r,
            left.stride(0), left.stride(1), right.stride(0), right.stride(1),
            thin.stride(0), thin.stride(1), wide.stride(0), wide.stride(1), y.stride(0),
            M_BITS=m.bit_length(), HAS_BIAS=bias is not None, BLOCK_R=max(16, triton.next_power_of_2(r)),
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        )  # fmt: skip
    return y


def _tilings() -> list[Any]:
    if knobs.runtime.interpret:  # which has no clock to choose by
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2})]
    return [
        triton.Config(
            {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner, "GROUP_M": 8}, num_stages=stages, num_warps=warps
        )
        for rows, columns, inner, stages, warps in (
            (128, 256, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 32, 4, 4), (64, 256, 64, 3, 8),
            (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (32, 64, 64, 4, 4),
        )
    ]  # fmt: skip


# Tuned once for a shape of the weights and a power of two of tokens: batches of other lengths are not tuned again.
@triton.autotune(configs=_tilings(), key=["n", "k", "BLOCK_R", "M_BITS"])
@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    left, right, bias, thin, wide, out, m, n, k, r,
    left_m, left_k, right_k, right_n, thin_m, thin_r, wide_r, wide_n, out_m,
    M_BITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Tiles in bands of GROUP_M rows, so that neighbours find the same columns of `right` in the cache.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = tile // (GROUP_M * tiles_n)
    height = min(tiles_m - band * GROUP_M, GROUP_M)
    row = band * GROUP_M + (tile % (GROUP_M * tiles_n)) % height
    column = (tile % (GROUP_M * tiles_n)) // height

    rows = (row * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_rows, in_columns = rows[:, None] < m, columns[None, :] < n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(left + rows[:, None] * left_m + inner[None, :] * left_k, in_rows & (inner[None, :] < k), 0.0)
        w = tl.load(
            right + inner[:, None] * right_k + columns[None, :] * right_n, in_columns & (inner[:, None] < k), 0.0
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)

    ranks = tl.arange(0, BLOCK_R)
    z = tl.load(thin + rows[:, None] * thin_m + ranks[None, :] * thin_r, in_rows & (ranks[None, :] < r), 0.0)
    b = tl.load(wide + ranks[:, None] * wide_r + columns[None, :] * wide_n, in_columns & (ranks[:, None] < r), 0.0)
    total = tl.dot(z, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * out_m + columns[None, :], total.to(out.dtype.element_ty), in_rows & in_columns)
