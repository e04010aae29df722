"""Metrics against hand calculations and the libraries' own numbers, and their edge cases (3 s)."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import sacrebleu
import sklearn
from scipy import stats
from sklearn import metrics as sk

from more_ds.metrics import METRICS, evaluate_metrics, majority_prediction, majority_scores, standard_errors
from more_ds.tasks.schema import Label, Scale, Task

TEXTS = ("exact_match", "bleu")  # the others are in test_nlg_metrics.py
CLASSES = (Label("no", ("0",)), Label("yes", ("1",)))


def _task(*metrics: str, **fields: Any) -> Task:
    return Task(name="t", suite="s", prompt="{x}", metrics=metrics, primary=metrics[0], **fields)


def score(name: str, predictions: list[Any], golds: list[Any]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return METRICS[name].fn(predictions, golds)


# Confusion counts: TP 3, FP 1, FN 2, TN 4.
PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
GOLDS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_classification_by_hand() -> None:
    assert score("accuracy", PREDICTIONS, GOLDS) == pytest.approx(70.0)
    assert score("f1", PREDICTIONS, GOLDS) == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    assert score("matthews", PREDICTIONS, GOLDS) == pytest.approx(100 * (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


def test_correlations_by_hand() -> None:
    # Deviations x: -2 -1 0 3, y: -1 0 -2 3; sums of squares 14 and 14, of products 2 + 0 + 0 + 9.
    x, y = [0.0, 1.0, 2.0, 5.0], [2.0, 3.0, 1.0, 6.0]
    assert score("pearson", x, y) == pytest.approx(100 * 11 / 14)
    # Ranks 1 2 3 4 and 2 3 1 4: squared differences 1 + 1 + 4 + 0.
    assert score("spearman", x, y) == pytest.approx(100 * (1 - 6 * 6 / (4 * 15)))


def test_agreement_with_the_libraries() -> None:
    rng = np.random.RandomState(0)
    for _ in range(20):
        golds, found = rng.randint(0, 2, 50).tolist(), rng.randint(0, 2, 50).tolist()
        assert score("accuracy", found, golds) == pytest.approx(100 * sk.accuracy_score(golds, found))
        assert score("f1", found, golds) == pytest.approx(100 * sk.f1_score(golds, found))
        assert score("matthews", found, golds) == pytest.approx(100 * sk.matthews_corrcoef(golds, found))
        x, y = (rng.rand(50) * 5).round(1).tolist(), (rng.rand(50) * 5).round(1).tolist()
        assert score("pearson", x, y) == pytest.approx(100 * stats.pearsonr(x, y)[0])
        assert score("spearman", x, y) == pytest.approx(100 * stats.spearmanr(x, y)[0])


def test_exact_match_by_hand() -> None:
    assert score("exact_match", [" a ", "b", None, "d"], [("x", "a"), ("B",), ("c",), ("d",)]) == 50.0


def test_bleu_by_hand() -> None:
    # Lower-cased: 1-grams 4/5 ("big" occurs in no reference), 2-grams 2/4, 3-grams 1/3, 4-grams 0/2, which
    # exponential smoothing makes 1/(2*2); the nearest reference has 5 tokens too, so no brevity penalty.
    hypothesis = ["The shop is BIG ."]
    references = [("the shop is red .", "a shop")]
    by_hand = 100 * math.exp(sum(map(math.log, (4 / 5, 2 / 4, 1 / 3, 1 / 4))) / 4)
    assert score("bleu", hypothesis, references) == pytest.approx(by_hand)


def test_bleu_with_uneven_numbers_of_references() -> None:
    found = ["the red shop sells good bread .", "it is near the old bridge"]
    golds = [
        ("the red shop sells bread .", "good bread at the shop .", "the shop sells good bread ."),
        ("it is near a bridge",),
    ]
    streams: Any = [[golds[0][i], golds[1][0] if i == 0 else None] for i in range(3)]
    expected = sacrebleu.corpus_bleu(found, streams, lowercase=True, tokenize="13a").score
    assert score("bleu", found, golds) == pytest.approx(expected)
    # A missing reference is absent; as an empty line it would weaken the brevity penalty of this short answer.
    short = [found[0], "it"]
    with_empty = [[ref or "" for ref in stream] for stream in streams]
    honest = score("bleu", short, golds)
    assert honest < sacrebleu.corpus_bleu(short, with_empty, lowercase=True, tokenize="13a").score


def _samples(name: str) -> tuple[list[Any], list[Any]]:
    kind = METRICS[name].kinds[0]
    if kind == "labels":
        return PREDICTIONS, GOLDS
    if kind == "scale":
        return [0.0, 1.0, 2.0, 5.0], [2.0, 3.0, 1.0, 6.0]
    return ["a b c d e", "f g h i", "k"], [("a b c d e",), ("f g h x", "f g h j"), ("l",)]


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].kinds != ("text",) or name in TEXTS])
def test_bounds_order_and_unreadable_answers(name: str) -> None:
    metric = METRICS[name]
    predictions, golds = _samples(name)
    perfect = [gold[0] if isinstance(gold, tuple) else gold for gold in golds]
    assert metric.higher_is_better
    assert metric.name == name
    assert score(name, perfect, golds) == pytest.approx(metric.high)
    value = score(name, predictions, golds)
    assert metric.low <= value < metric.high
    order = list(range(len(golds)))
    random.Random(3).shuffle(order)
    shuffled = score(name, [predictions[i] for i in order], [golds[i] for i in order])
    assert shuffled == pytest.approx(value, abs=1e-9)
    assert score(name, [None] * len(golds), golds) == 0.0
    assert score(name, [None, *perfect[1:]], golds) < metric.high, "an unreadable answer costs nothing"


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constant_sides_are_zero(name: str) -> None:
    varied = [0, 1, 1, 0] if name == "matthews" else [0.0, 1.0, 2.0, 5.0]
    for constant in (0, 1, None):
        assert score(name, [constant] * 4, varied) == 0.0
    assert score(name, varied, [1, 1, 1, 1]) == 0.0
    assert score(name, [1], [1]) == 0.0
    if name != "matthews":
        nearly = [0.1, 0.1, 0.1 + 1e-17, 0.1 * (1 + 1e-15)]
        assert -100.0 <= score(name, nearly, varied) <= 100.0


def test_opposite_predictions_reach_the_lower_bound() -> None:
    assert score("matthews", [1 - gold for gold in GOLDS], GOLDS) == pytest.approx(-100.0)
    assert score("pearson", [-2.0, -4.0, -6.0], [1.0, 2.0, 3.0]) == pytest.approx(-100.0)
    assert score("f1", [0, 0], [1, 1]) == 0.0


def test_unreadable_answers_by_hand() -> None:
    assert score("accuracy", [None, 1, 0, 0], [0, 1, 0, 1]) == 50.0
    # Gold 0 unread counts as a false positive: TP 1, FP 1, FN 1.
    assert score("f1", [None, 1, 0, 0], [0, 1, 0, 1]) == pytest.approx(50.0)
    # Right on every positive, unreadable on every negative: not a perfect score.
    assert score("matthews", [None, None, 1, 1], [0, 0, 1, 1]) == pytest.approx(50.0)
    assert score("pearson", [None, 2.0, 4.0], [1.0, 2.0, 3.0]) == score("pearson", [0.0, 2.0, 4.0], [1.0, 2.0, 3.0])


def test_evaluate_metrics() -> None:
    task = _task("f1", "accuracy", labels=CLASSES)
    scores = evaluate_metrics(task, PREDICTIONS, GOLDS)
    assert list(scores) == ["f1", "accuracy"]
    assert scores["accuracy"] == pytest.approx(70.0)
    for predictions, golds in (([], []), ([1], [1, 0]), ([1, 0], [1])):
        with pytest.raises(ValueError, match=r"t: \d predictions for \d examples"):
            evaluate_metrics(task, predictions, golds)


def test_majority_baseline() -> None:
    labels = _task("accuracy", "matthews", labels=CLASSES)
    assert majority_prediction(labels, [1, 0, 1]) == 1
    assert majority_prediction(labels, [1, 0]) == 0
    assert majority_scores(labels, [1, 0, 1], [1, 1, 1, 0]) == {"accuracy": 75.0, "matthews": 0.0}
    scale = _task("pearson", "spearman", scale=Scale(0.0, 5.0, 0.2))
    assert majority_prediction(scale, [5.0, 1.0, 2.0, 4.0]) == 2.0
    assert majority_scores(scale, [5.0, 1.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    text = _task("exact_match", references="r")
    assert majority_prediction(text, [("b", "a"), ("c", "b"), ("a",)]) == "a"
    assert majority_scores(text, [("b", "a"), ("b",)], [("b",), ("z",)]) == {"exact_match": 50.0}
    with pytest.raises(ValueError, match="t: no examples"):
        majority_prediction(labels, [])


ANSWERS: dict[str, tuple[list[Any], list[Any]]] = {
    "accuracy": ([0, 1, 2, None], [0, 1, 2]),
    "f1": ([0, 1, None], [0, 1]),
    "matthews": ([0, 1, 2, None], [0, 1, 2]),
    "pearson": ([0.0, 1.2, 4.8, None], [0.0, 0.25, 3.8, 5.0]),
    "exact_match": (["a", " b ", "", None], [("a",), ("b", "c"), ("d",)]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_sums_are_the_metric(name: str) -> None:
    """Also where a side is constant, a class is absent and an answer unreadable: the small corpora have all of it."""
    draw = random.Random(0)
    answers, golds = ANSWERS[name]
    for size in [1, 2, 3, 5, 40] * 30:
        found, gold = draw.choices(answers, k=size), draw.choices(golds, k=size)
        assert METRICS[name].resampled(found, gold) == pytest.approx(METRICS[name].fn(found, gold), abs=1e-9)
    assert METRICS[name].resampled(answers[:1] * 9, golds[:1] * 9) == METRICS[name].fn(answers[:1] * 9, golds[:1] * 9)


def test_standard_errors_of_every_metric() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=400)
    y = 0.6 * x + 0.8 * draw.normal(size=400)
    found = standard_errors(_task("pearson", "spearman", scale=Scale(-5, 5, 0.1)), x.tolist(), y.tolist(), 300)
    # The standard error of a correlation of a normal sample is (1 - r^2) / sqrt(n).
    assert found["pearson"] == pytest.approx(100 * (1 - 0.36) / 20, rel=0.2)
    assert list(found) == ["pearson", "spearman"]
    words = standard_errors(_task("bleu", "exact_match"), ["a"] * 3 + ["b"], [("a",)] * 4, 30)
    assert list(words) == ["bleu", "exact_match"]


def test_a_signature_names_the_library_and_its_version() -> None:
    assert METRICS["accuracy"].signature == f"scikit-learn:{sklearn.__version__}"
    theirs = sacrebleu.metrics.BLEU(lowercase=True, tokenize="13a", force=True)
    theirs.corpus_score(["a", "b"], [["a", "b"], ["b", None]])
    assert METRICS["bleu"].signature == str(theirs.get_signature())
