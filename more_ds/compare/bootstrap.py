"""Bootstrap over examples: the standard error of a corpus metric, and a paired test of two systems.

A resample draws as many examples as there are, with replacement. The same seed draws the same examples for every
metric and system, so that numbers can be repeated. Efron and Tibshirani (1993), An Introduction to the Bootstrap;
the paired form after Koehn (2004), Statistical Significance Tests for Machine Translation Evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
RESAMPLES = 200
"""Resamples behind a standard error, which they give to about 5 %; a test takes more."""
LEVEL = 0.95
"""Coverage of the paired test's interval."""


@dataclass(frozen=True)
class Sums:
    """A corpus metric that reads its examples through sums alone, so that a resample costs one product.

    Attributes:
        statistics: (predictions, golds) -> what each example adds, (examples, k).
        value: the sums, (k,) -> the metric.
    """

    statistics: Callable[[Sequence[Any], Sequence[Any]], Floats]
    value: Callable[[Floats], float]

    def __call__(self, predictions: Sequence[Any], golds: Sequence[Any]) -> float:
        """The metric of the whole corpus."""
        return self.value(self.statistics(predictions, golds).sum(axis=0))


CorpusMetric: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], float]
"""(predictions, golds) -> the metric; one that is a `Sums` is resampled fast."""


class TaskPair(NamedTuple):
    """Two systems' predictions for the examples of one task, and the metric that is to judge them."""

    fn: CorpusMetric
    a: Sequence[Any]
    b: Sequence[Any]
    golds: Sequence[Any]


class RepeatedPair(NamedTuple):
    """The same of two systems that have been trained several times: a list of predictions for each run."""

    fn: CorpusMetric
    a: Sequence[Sequence[Any]]
    b: Sequence[Sequence[Any]]
    golds: Sequence[Any]


class Paired(NamedTuple):
    """How two systems differ on the same examples.

    Attributes:
        difference: the metric of the first system less that of the second.
        p: two-sided: how often a difference as large arises where there is none; never 0.
        interval: lower and upper end of the difference's percentile interval, at `LEVEL`.
    """

    difference: float
    p: float
    interval: tuple[float, float]


def standard_error(
    fn: CorpusMetric, predictions: Sequence[Any], golds: Sequence[Any], resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Standard deviation of a metric over resamples of the examples, in the metric's unit.

    Raises:
        ValueError: no examples, not one prediction for each, or fewer than two resamples.
    """
    return float(np.std(_resampled(fn, [predictions], golds, resamples, seed)[0], ddof=1))


def paired_test(
    fn: CorpusMetric,
    a: Sequence[Any],
    b: Sequence[Any],
    golds: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
) -> Paired:
    """Compare two systems' predictions for the same examples.

    Raises:
        ValueError: as in `standard_error`.
    """
    return paired_mean_test([TaskPair(fn, a, b, golds)], resamples, seed)


def paired_mean_test(tasks: Sequence[TaskPair], resamples: int = 1000, seed: int = 0) -> Paired:
    """Compare two systems by the mean of a metric over several tasks, whose examples are drawn apart.

    Raises:
        ValueError: no tasks, and as in `standard_error`.
    """
    return repeated_mean_test([RepeatedPair(fn, [a], [b], golds) for fn, a, b, golds in tasks], resamples, seed)


def repeated_mean_test(tasks: Sequence[RepeatedPair], resamples: int = 1000, seed: int = 0) -> Paired:
    """Compare two systems that were trained several times, by the mean over tasks and runs.

    All runs are scored on the same resample of a task's examples. What chance in training does to the runs is not in
    the test; their deviation shows it.

    The resampled differences, moved to a mean of zero, say how large a difference chance alone makes.

    Raises:
        ValueError: no tasks, and as in `standard_error`.
    """
    drawn = np.zeros(resamples)
    differences = []
    for number, (fn, a, b, golds) in enumerate(tasks):
        values = _resampled(fn, [*a, *b], golds, resamples, seed + number)
        drawn += (values[: len(a)].mean(0) - values[len(a) :].mean(0)) / len(tasks)
        differences.append(fmean(fn(run, golds) for run in a) - fmean(fn(run, golds) for run in b))
    difference = fmean(differences)
    # A rounding error must not part two differences that are the same.
    extreme = np.abs(drawn - drawn.mean()) >= abs(difference) - 1e-9
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Paired(difference, (int(extreme.sum()) + 1) / (resamples + 1), (float(low), float(high)))


def _resampled(
    fn: CorpusMetric, systems: Sequence[Sequence[Any]], golds: Sequence[Any], resamples: int, seed: int
) -> Floats:
    """The metric of every system on the same resamples, (systems, resamples)."""
    count = len(golds)
    if count == 0 or any(len(system) != count for system in systems):
        raise ValueError(f"{[len(system) for system in systems]} predictions for {count} examples")
    if resamples < 2:
        raise ValueError(f"{resamples} resamples; two or more are needed")
    draw = np.random.default_rng(seed)
    statistics = [fn.statistics(system, golds) for system in systems] if isinstance(fn, Sums) else []
    values = np.empty((len(systems), resamples))
    for i in range(resamples):
        rows = draw.integers(count, size=count)
        if isinstance(fn, Sums):
            times = np.bincount(rows, minlength=count).astype(np.float64)
            values[:, i] = [fn.value(times @ own) for own in statistics]
        else:
            chosen = rows.tolist()
            drawn = [golds[j] for j in chosen]
            values[:, i] = [fn([system[j] for j in chosen], drawn) for system in systems]
    return values
