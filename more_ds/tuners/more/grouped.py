"""Products with the matrices of experts: the tokens of an expert side by side, one product for each expert."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812


class Routing:
    """Which expert reads which token: the (token, expert) pairs of a batch, sorted by expert.

    Attributes:
        num_tokens: of the batch.
        tokens: (pairs,) the token of every pair.
        experts: (pairs,) its expert.
        ends: (experts,) where the pairs of an expert end, int32.
    """

    def __init__(self, chosen: Tensor, num_experts: int) -> None:
        """Sort the pairs.

        Args:
            chosen: (tokens, k) the experts of every token.
            num_experts: how many there are.
        """
        self.num_tokens, self.k = chosen.shape
        flat = chosen.reshape(-1).long()
        self._order = torch.argsort(flat, stable=True)
        self.tokens = self._order // self.k
        self.experts = flat[self._order]
        counts = torch.zeros(num_experts, dtype=torch.long, device=flat.device).scatter_add_(
            0, flat, torch.ones_like(flat)
        )
        self.ends = counts.cumsum(0).int()

    @cached_property
    def bounds(self) -> list[int]:
        """Where the pairs of each expert begin, and, last, the number of pairs; a GPU is asked for it, once."""
        pairs, num_experts = len(self.tokens), len(self.ends)
        if self.ends.is_meta:  # where shapes alone are wanted, every expert has its share
            return [e * pairs // num_experts for e in range(num_experts + 1)]
        return [0, *self.ends.tolist()]

    def combined(self, values: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts: (pairs, width) and (tokens, k) to (tokens, width).

        In the order of the experts that the router chose, so that the result does not depend on a race.
        """
        place = torch.empty_like(self._order).scatter_(
            0, self._order, torch.arange(len(self._order), device=self._order.device)
        )
        return (values[place].view(self.num_tokens, self.k, -1) * weights.unsqueeze(-1)).sum(1)


class Stack(nn.Module):
    """A linear map without bias for every expert: `weight` is (experts, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        """Make the maps, not initialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Map (pairs, in) to (pairs, out)."""
        return grouped_linear(x, self.weight, routing)

    def extra_repr(self) -> str:
        """The sizes, as torch's modules show theirs."""
        num_experts, out_features, in_features = getattr(self.weight, "ds_shape", self.weight.shape)
        return f"{num_experts} experts, {in_features=}, {out_features=}"


def grouped_linear(x: Tensor, weight: Tensor, routing: Routing, transposed: bool = False) -> Tensor:
    """Map every pair's x by the matrix of its expert.

    Args:
        x: (pairs, in).
        weight: (experts, out, in).
        routing: of the batch.
        transposed: the weight is (experts, in, out).

    Returns:
        (pairs, out) in the type of the weight.
    """
    result: Tensor = _GroupedLinear.apply(x.to(weight.dtype), weight, routing, transposed)
    return result


class _GroupedLinear(torch.autograd.Function):
    """Keeps the weight itself and no view of it: ZeRO-3 can then take it away between the two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, routing: Routing, transposed: bool) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.routing, ctx.transposed = routing, transposed
        return _products(x, weight if transposed else weight.mT, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, to_x, to_weight = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            to_x = _products(grad, weight.mT if ctx.transposed else weight, ctx.routing)
        if ctx.needs_input_grad[1]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            to_weight = _outer(left, right, ctx.routing)
        return to_x, to_weight, None, None


def _products(x: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """(pairs, in) times the (experts, in, out) of their experts."""
    if _has_kernel(x, *matrices.shape[1:]):
        return F.grouped_mm(x, matrices, offs=routing.ends)
    result = x.new_empty(len(x), matrices.shape[2])
    for e, (begin, end) in enumerate(zip(routing.bounds, routing.bounds[1:], strict=False)):
        if end > begin:
            torch.mm(x[begin:end], matrices[e], out=result[begin:end])
    return result


def _outer(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """The sum of the outer products of every expert's pairs: (pairs, m) and (pairs, n) to (experts, m, n)."""
    if _has_kernel(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.mT, right, offs=routing.ends)
    result = left.new_zeros(len(routing.bounds) - 1, left.shape[1], right.shape[1])
    for e, (begin, end) in enumerate(zip(routing.bounds, routing.bounds[1:], strict=False)):
        if end > begin:
            torch.mm(left[begin:end].mT, right[begin:end], out=result[e])
    return result


def _has_kernel(x: Tensor, *widths: int) -> bool:
    """Whether torch has one kernel for all experts: in bfloat16, on GPUs from the A100 on, for rows of 16 bytes."""
    aligned = all(width % 8 == 0 for width in widths)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)
