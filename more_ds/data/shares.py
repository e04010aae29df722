"""How large a share of the training each task gets."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np

from more_ds.data.streams import FloatArray
from more_ds.errors import UserError, suggest

STRATEGIES = ("exp_share", "proportional", "uniform", "temperature", "weights")

_MIN_PROBABILITY = 1e-12  # below this a task is, in any real run, silently never drawn


def task_probabilities(
    sizes: Sequence[int],
    strategy: str,
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
) -> FloatArray:
    """Probability of each task, shape [num_tasks], sum 1.

    "exp_share" is equation 7 of the MoRE paper, exp(|D_t| / sum |D|) normalised, which flattens the
    sizes; "proportional" is |D_t|; "uniform" is 1; "temperature" is |D_t|^(1/temperature);
    "weights" takes `weights` as given (0 leaves a task out).

    Raises:
        UserError: an empty task, an unknown strategy, an option that the strategy does not use, or
            a task whose probability is too small ever to be drawn.
    """
    sizes = [operator.index(size) for size in sizes]
    if not sizes or min(sizes) < 1:
        raise UserError(f"every task needs at least one sample; found sizes {sizes}")
    if strategy not in STRATEGIES:
        raise UserError(f"unknown sampling strategy '{strategy}'{suggest(strategy, STRATEGIES)}")
    if strategy != "temperature" and temperature != 1.0:
        raise UserError(
            f"sampling temperature {temperature} has no effect with strategy '{strategy}'; "
            "use strategy 'temperature' or leave the temperature out"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"the sampling temperature must be above 0 and finite; found {temperature}")
    if (weights is not None) != (strategy == "weights"):
        found = "no weights" if weights is None else f"{len(weights)} weights"
        raise UserError(
            f"weights go with strategy 'weights'; found {found} with strategy '{strategy}'; give both or neither"
        )
    raw = _raw_shares(sizes, strategy, temperature, weights)
    top = max(raw)
    total = math.fsum(value / top for value in raw)
    shares = [value / top / total for value in raw]
    for task, (value, share) in enumerate(zip(raw, shares, strict=True)):
        if share < _MIN_PROBABILITY and (value > 0 or strategy != "weights"):
            raise UserError(
                f"task {task} would get probability {share:.1e}, so it would never be drawn; "
                "raise its weight or the temperature, or leave the task out"
            )
    return np.array(shares, dtype=np.float64)


def _raw_shares(
    sizes: Sequence[int], strategy: str, temperature: float, weights: Sequence[float] | None
) -> list[float]:
    if weights is not None:
        if len(weights) != len(sizes):
            raise UserError(f"one weight per task is needed; found {len(weights)} weights for {len(sizes)} tasks")
        raw = [float(weight) for weight in weights]
        if not all(math.isfinite(weight) and weight >= 0 for weight in raw) or max(raw) == 0:
            raise UserError(f"sampling weights must be finite, not negative and not all 0; found {raw}")
        return raw
    total, largest = sum(sizes), max(sizes)
    if strategy == "exp_share":
        return [math.exp(size / total) for size in sizes]
    if strategy == "temperature":
        return [math.exp(math.log(size / largest) / temperature) for size in sizes]
    return [1.0 if strategy == "uniform" else float(size) for size in sizes]


def covering_units(sizes: Sequence[int], unit: int, multiple: int) -> list[int]:
    """Units an epoch that hold every sample of each task, in sum a multiple of `multiple`.

    Fewer than `multiple` units are added to the rounded-up sizes, each where it changes the
    shares least, so no task gets multiple * unit samples (one global batch) more than it has.
    """
    counts = [-(-size // unit) for size in sizes]
    for _ in range(-sum(counts) % multiple):
        counts[max(range(len(sizes)), key=lambda t: sizes[t] / (counts[t] + 1))] += 1
    return counts
