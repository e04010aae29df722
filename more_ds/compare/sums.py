"""Metrics of `more_ds.metrics` as functions of sums over the examples, which a bootstrap resamples fast.

Each agrees with its function there, unreadable answers and constant sides included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from more_ds.compare.bootstrap import Floats, Sums


def _hits(predictions: Sequence[Any], golds: Sequence[Any]) -> Floats:
    hits = [p is not None and p == gold for p, gold in zip(predictions, golds, strict=True)]
    return _counted(hits)


def _exact_hits(predictions: Sequence[str | None], golds: Sequence[tuple[str, ...]]) -> Floats:
    hits = [
        p is not None and p.strip() in {gold.strip() for gold in refs}
        for p, refs in zip(predictions, golds, strict=True)
    ]
    return _counted(hits)


def _counted(hits: Sequence[bool]) -> Floats:
    return np.stack([np.array(hits, dtype=np.float64), np.ones(len(hits))], axis=1)


def _share(sums: Floats) -> float:
    return 100.0 * float(sums[0] / sums[1])


def _positives(predictions: Sequence[int | None], golds: Sequence[int]) -> Floats:
    """Hits, predicted and gold members of class 1."""
    positive = np.array(golds) == 1
    found = np.array([gold != 1 if p is None else p == 1 for p, gold in zip(predictions, golds, strict=True)])
    return np.stack([positive & found, found, positive], axis=1).astype(np.float64)


def _f1_of(sums: Floats) -> float:
    hits, found, positive = sums
    return 100.0 * float(2 * hits / (found + positive)) if found + positive else 0.0


def _confusion(predictions: Sequence[int | None], golds: Sequence[int]) -> Floats:
    """One column for every pair of gold and predicted class, as a flattened square."""
    classes, codes = np.unique([*golds, *(-1 if p is None else p for p in predictions)], return_inverse=True)
    gold, found = codes.reshape(2, -1)
    return np.eye(len(classes) ** 2)[gold * len(classes) + found]


def _matthews_of(sums: Floats) -> float:
    """Gorodkin (2004), Comparing two K-category assignments by a K-category correlation coefficient."""
    width = math.isqrt(len(sums))
    table = sums.reshape(width, width)
    gold, found, count = table.sum(axis=1), table.sum(axis=0), table.sum()
    spread = float((count**2 - gold @ gold) * (count**2 - found @ found))
    return 100.0 * float(count * table.trace() - gold @ found) / math.sqrt(spread) if spread > 0.0 else 0.0


def _moments(predictions: Sequence[float | None], golds: Sequence[float]) -> Floats:
    """First and second moments about the sample's means, which keep the digits that raw sums would lose."""
    x, y = np.array([p or 0.0 for p in predictions]), np.array(golds, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)


def _pearson_of(sums: Floats) -> float:
    _, x, y, xx, yy, xy = sums / sums[0]
    variance_x, variance_y = xx - x * x, yy - y * y
    # A constant side has a variance of zero but for rounding.
    if variance_x <= 1e-12 * xx or variance_y <= 1e-12 * yy:
        return 0.0
    return 100.0 * float((xy - x * y) / math.sqrt(variance_x * variance_y))


ACCURACY = Sums(_hits, _share)
EXACT_MATCH = Sums(_exact_hits, _share)
F1 = Sums(_positives, _f1_of)
MATTHEWS = Sums(_confusion, _matthews_of)
PEARSON = Sums(_moments, _pearson_of)
