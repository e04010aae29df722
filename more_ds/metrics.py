"""Metrics over a whole corpus, in percent unless a metric says otherwise.

Those of classes and scores are here, those of texts in `more_ds.nlg_metrics`; `METRICS` has them all. Each is a pure
function `fn(predictions, golds) -> float`; it never sees batches, does not depend on the order of the examples, never
returns NaN, and prints nothing. A prediction of None is an answer that could not be read: wrong for a class, 0.0 for a
graded score (as in MoRE's published code), an empty text. scikit-learn and SciPy do the arithmetic.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median_low
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from more_ds.compare import sums
from more_ds.compare.bootstrap import CorpusMetric, Sums, standard_error
from more_ds.errors import UserError
from more_ds.nlg_metrics import TEXT_METRICS, TextMetric

if TYPE_CHECKING:
    from more_ds.tasks.schema import Task

Prediction = int | float | str | None
Gold = int | float | tuple[str, ...]
SKLEARN, SCIPY = f"scikit-learn:{version('scikit-learn')}", f"scipy:{version('scipy')}"


@dataclass(frozen=True)
class Metric:
    """A corpus metric.

    Attributes:
        kinds: the kinds of task (`more_ds.tasks.schema.Task.kind`) it is defined for.
        low, high: range of its values.
        sums: the same metric as a function of sums over the examples, for a fast bootstrap; None: it is none.
        signature: what its number depends on: settings, library and its version.
        missing: what has to be installed before it can be computed, or None.
    """

    name: str
    fn: Callable[[Sequence[Any], Sequence[Any]], float]
    kinds: tuple[str, ...]
    low: float = 0.0
    high: float = 100.0
    higher_is_better: bool = True
    sums: Sums | None = None
    signature: str = ""
    missing: Callable[[], str | None] = lambda: None

    @property
    def resampled(self) -> CorpusMetric:
        """What a bootstrap computes: `sums` where there are any, else `fn`."""
        return self.sums or self.fn


def accuracy(predictions: Sequence[int | None], golds: Sequence[int]) -> float:
    """Share of examples whose predicted index is the gold one."""
    return 100.0 * float(accuracy_score(golds, _classes(predictions)))


def f1(predictions: Sequence[int | None], golds: Sequence[int]) -> float:
    """F1 of the positive class, index 1 (the GLUE convention for MRPC and QQP).

    An unreadable answer counts as the class that is wrong, so that it costs precision as well.
    """
    pairs = zip(predictions, golds, strict=True)
    found = [int(gold != 1 if p is None else p == 1) for p, gold in pairs]
    positive = [int(gold == 1) for gold in golds]
    return 100.0 * float(f1_score(positive, found, zero_division=0.0))


def matthews(predictions: Sequence[int | None], golds: Sequence[int]) -> float:
    """Matthews correlation; 0 when a side is constant. Unreadable answers are a class apart."""
    if len(set(golds)) < 2 or len(set(predictions)) < 2:
        return 0.0
    return 100.0 * float(matthews_corrcoef(golds, _classes(predictions)))


def pearson(predictions: Sequence[float | None], golds: Sequence[float]) -> float:
    """Pearson correlation; 0 when either side is constant."""
    return _correlation(pearsonr, predictions, golds)


def spearman(predictions: Sequence[float | None], golds: Sequence[float]) -> float:
    """Spearman rank correlation, ties averaged; 0 when either side is constant."""
    return _correlation(spearmanr, predictions, golds)


def exact_match(predictions: Sequence[str | None], golds: Sequence[tuple[str, ...]]) -> float:
    """Share of texts equal to one of their references, surrounding white space aside."""
    pairs = zip(predictions, golds, strict=True)
    hits = [p is not None and p.strip() in {gold.strip() for gold in refs} for p, refs in pairs]
    return 100.0 * sum(hits) / len(hits)


def _of_text(metric: TextMetric) -> Metric:
    return Metric(
        metric.name, metric.sums, ("text",), high=metric.high, higher_is_better=metric.higher_is_better,
        sums=metric.sums, signature=metric.signature, missing=metric.missing,
    )  # fmt: skip


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy, ("labels", "options"), sums=sums.ACCURACY, signature=SKLEARN),
        Metric("f1", f1, ("labels",), sums=sums.F1, signature=SKLEARN),
        Metric("matthews", matthews, ("labels",), low=-100.0, sums=sums.MATTHEWS, signature=SKLEARN),
        Metric("pearson", pearson, ("scale",), low=-100.0, sums=sums.PEARSON, signature=SCIPY),
        Metric("spearman", spearman, ("scale",), low=-100.0, signature=SCIPY),
        Metric("exact_match", exact_match, ("text",), sums=sums.EXACT_MATCH),
        *(_of_text(metric) for metric in TEXT_METRICS),
    )
}


def require(names: Iterable[str]) -> None:
    """Refuse metrics that need something which is not installed.

    Raises:
        UserError: naming the metric, and what it needs.
    """
    for name in names:
        missing = METRICS[name].missing()
        if missing is not None:
            raise UserError(f"metric '{name}' needs {missing}; install it, or leave the metric out")


def evaluate_metrics(task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold]) -> dict[str, float]:
    """Return every metric of `task`, in percent, by name and in the task's order.

    Args:
        predictions: one per example: an option's index (`labels`, `options`), a score (`scale`), a
            text (`text`), or None.
        golds: as in `Example.gold`.

    Raises:
        ValueError: no examples, or not one prediction for each.
    """
    if not golds or len(predictions) != len(golds):
        raise ValueError(f"{task.name}: {len(predictions)} predictions for {len(golds)} examples")
    return {name: METRICS[name].fn(predictions, golds) for name in task.metrics}


def standard_errors(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold], resamples: int, seed: int = 0
) -> dict[str, float]:
    """Return the bootstrap standard error of every metric of `task`, in the metric's unit."""
    return {name: standard_error(METRICS[name].resampled, predictions, golds, resamples, seed) for name in task.metrics}


def majority_prediction(task: Task, train_golds: Sequence[Gold]) -> Prediction:
    """Return the constant answer of the majority baseline.

    The most frequent index (a tie goes to the lowest); the median of a graded score, whose
    correlations are 0 as those of any constant; the most frequent reference of free text (a tie
    goes to the first in alphabetical order).

    Raises:
        ValueError: no examples.
    """
    if not train_golds:
        raise ValueError(f"{task.name}: no examples")
    answers: list[Any] = []
    for gold in train_golds:
        answers += gold if isinstance(gold, tuple) else [gold]
    if task.kind == "scale":
        return float(median_low(answers))
    counts = Counter(answers)
    return cast(Prediction, min(counts, key=lambda answer: (-counts[answer], answer)))


def majority_scores(task: Task, train_golds: Sequence[Gold], golds: Sequence[Gold]) -> dict[str, float]:
    """Return the metrics of the majority baseline on `golds`, as `evaluate_metrics` does."""
    return evaluate_metrics(task, [majority_prediction(task, train_golds)] * len(golds), golds)


def _classes(predictions: Sequence[int | None]) -> list[int]:
    return [-1 if p is None else p for p in predictions]


def _correlation(fn: Callable[..., Any], predictions: Sequence[float | None], golds: Sequence[float]) -> float:
    x = np.array([0.0 if p is None else p for p in predictions], dtype=np.float64)
    y = np.array(golds, dtype=np.float64)
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input
        value = float(fn(x, y)[0])
    return 100.0 * value if math.isfinite(value) else 0.0
