"""What the experts of one adapted map are made of: their components, the gate, and the task embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast


def expert_table(r: int, num_tasks: int, scale: str, experts: str, seed: int) -> Tensor:
    """What each expert multiplies the r components by: row k-1 is c(k) on the components of expert k.

    Returns:
        (r, r) float64, without alpha / r.
    """
    if experts == "prefix":
        members = torch.tril(torch.ones(r, r, dtype=torch.float64))
    else:
        generator = torch.Generator().manual_seed(seed)
        members = torch.stack([(torch.randperm(r, generator=generator) < k).double() for k in range(1, r + 1)])
    size = torch.arange(1, r + 1, dtype=torch.float64)
    if scale == "rank":
        return members * (size / num_tasks).unsqueeze(1)
    return members * (size / r) ** 2 if scale == "component" else members


class Gate(nn.Linear):
    """W_g e + b_g in float32 whatever the parameters' type and autocast say: in bfloat16, ties flip ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, h) to the (rows, r) logits, float32."""
        with without_autocast(x):
            return F.linear(*map(at_least_float32, (x, self.weight, self.bias)))


class TaskTable(nn.Module):
    """E, (tasks, h): the first tasks in one parameter, and each task added later in one of its own.

    A parameter of its own can be trained alone: nothing, weight decay included, then moves the others. It is read by
    calling it, since under ZeRO-3 a raw parameter may not be there.
    """

    def __init__(self, sizes: list[int], width: int) -> None:
        """Make a table of parts with `sizes` rows."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes[0], width))
        for size in sizes[1:]:
            self.append(torch.empty(size, width))

    def append(self, row: Tensor) -> None:
        """Add a task with the embedding `row`, (1, h)."""
        self.register_parameter(f"added_{len(self.parts()) - 1}", nn.Parameter(row, self.weight.requires_grad))

    def parts(self) -> list[Tensor]:
        """The first tasks' parameter, then the added ones'."""
        return list(self.parameters(recurse=False))

    def forward(self) -> Tensor:
        """The whole table, a copy."""
        return torch.cat(self.parts())


def task_probabilities(gate: Callable[[Tensor], Tensor], embeddings: Tensor, sizes: list[int]) -> Tensor:
    """p of every task, (tasks, r) float32.

    Each part of the task table, of `sizes` rows, has a product of its own: in one product the number of rows decides
    the last bits of all, and an added task would change the others.
    """
    return torch.softmax(torch.cat([gate(part) for part in embeddings.split(sizes)]), dim=-1)
