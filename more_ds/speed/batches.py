"""How many tokens a pass over real tasks computes, by how batches are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from more_ds.data.sampler import BalancedSampler
from more_ds.data.tokens import Tokens


@dataclass(frozen=True)
class TokenCounts:
    """Tokens a step on average: those that are real, and those that are computed with every way to pad."""

    real: float
    fixed: float
    dynamic: float
    grouped: float


def count_tokens(
    tokens: Sequence[Tokens], *, strategy: str, micro: int, groups: int, steps: int, fixed: int, seed: int = 0
) -> TokenCounts:
    """Count over the first `steps` optimizer steps of a sampler's plan.

    Args:
        tokens: of every task.
        strategy: of the sampler.
        micro: examples of a micro-batch.
        groups: micro-batches of a step.
        steps: to look at.
        fixed: length that all rows are padded to in the published code (128).
        seed: of the sampler.
    """
    lengths = [own.lengths for own in tokens]
    sizes = [len(own) for own in lengths]
    sums = []
    for known in (None, lengths):
        sampler = BalancedSampler(
            sizes, strategy=strategy, group_size=micro, groups_per_step=groups, seed=seed, lengths=known
        )
        real = padded = rows = 0
        for step in range(steps):
            for task, indices in sampler.micro_batches(step, rank=0, world_size=1, accumulation=groups):
                own = lengths[task][indices]
                real, padded, rows = real + int(own.sum()), padded + int(own.max()) * len(own), rows + len(own)
        sums.append(np.array([real, padded, rows * fixed]) / steps)
    return TokenCounts(
        real=sums[0][0], fixed=sums[0][2], dynamic=sums[0][1], grouped=sums[1][1] * sums[0][0] / sums[1][0]
    )
