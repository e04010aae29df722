"""Memory that a rank holds: what torch has allocated on its GPU, or else the resident set of its process."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import psutil
import torch
from torch import nn

from more_ds.engine import Ranks

GB = 1e9


def peak_gb() -> float:
    """The most that this process has held, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def by_rank(ranks: Ranks, model: nn.Module) -> dict[str, list[float]]:
    """What every rank holds, in GB, in the order of ranks. Collective.

    Args:
        ranks: the processes.
        model: whose parameters are counted; quantised ones by the bytes they are packed in, under ZeRO-3 a rank's part.

    Returns:
        `held` now, `peak` so far, and the `parameters` among what is held.
    """
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    kept = sum(getattr(p, "ds_tensor", p).nbytes for p in model.parameters())
    own = [held / GB, peak_gb(), kept / GB]
    table = torch.zeros(ranks.world, len(own), dtype=torch.float64)
    table[ranks.rank] = torch.tensor(own, dtype=torch.float64)
    columns = [[round(value, 6) for value in column] for column in ranks.sum(table).T.tolist()]
    return dict(zip(("held", "peak", "parameters"), columns, strict=True))


def words(memory: Mapping[str, Sequence[float]], kind: str) -> str:
    """One of the numbers of `by_rank`; every rank's, where they differ."""
    each = [f"{value:.3f}" for value in memory[kind]]
    return f"{each[0] if len(set(each)) == 1 else ' '.join(each)} GB"


def where() -> str:
    """What is counted, in words."""
    return "allocated on each GPU" if torch.cuda.is_available() else "resident in each process"


def at_peak(ranks: Ranks, model: nn.Module) -> str:
    """The most that each rank has held, in words. Collective."""
    return f"{words(by_rank(ranks, model), 'peak')} {where()}"
