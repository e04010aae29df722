"""Tables of results, the mean's standard error, and reading results back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from more_ds.errors import UserError
from more_ds.results import TaskResult, mean_error, mean_score, read_predictions, read_results, result_table
from more_ds.results import write_results as write


def result(task: str, value: float, **changes: Any) -> TaskResult:
    """A task's result with an accuracy, and an F1 ten points below."""
    made = TaskResult(
        task=task, suite="toy", split="test", mode="likelihood", metrics={"f1": value - 10, "accuracy": value},
        standard_errors={"f1": 2.0, "accuracy": 1.5}, signatures={"f1": "x:1", "accuracy": "x:1"},
        primary="accuracy", n=100, unparsable=0, cut=0, majority=None, prompt="p", data="d", records=[],
    )  # fmt: skip
    return replace(made, **changes)


def test_the_mean_is_that_of_the_primary_metrics_and_so_is_its_error() -> None:
    both = [result("a", 60.0, standard_errors={"accuracy": 3.0}), result("b", 71.0, standard_errors={"accuracy": 4.0})]
    assert mean_score(both) == 65.5
    assert mean_error(both) == pytest.approx(2.5)  # sqrt(9 + 16) / 2
    assert mean_error([both[0], replace(both[1], standard_errors={"f1": 4.0})]) is None


def test_one_table_a_suite() -> None:
    results = [result("a", 60.0), result("b", 70.0), result("c", 20.0, suite="other", unparsable=3)]
    text = result_table(results)
    first, second = text.split("\n\n")
    assert first.splitlines()[0] == "toy"
    assert [line.split() for line in first.splitlines()[1:]] == [
        ["task", "metric", "value", "+/-", "majority", "n"],
        ["---------", "--------", "-----", "----", "--------", "---"],
        ["a", "accuracy", "60.00", "1.50", "-", "100"],
        ["a", "f1", "50.00", "2.00", "-", "100"],
        ["b", "accuracy", "70.00", "1.50", "-", "100"],
        ["b", "f1", "60.00", "2.00", "-", "100"],
        ["mean", "of", "2", "primary", "65.00", "1.06", "-", "200"],
    ]
    assert second.splitlines()[0] == "other"
    assert "mean" not in second
    assert second.splitlines()[1].split()[-1] == "unparsable"
    assert result_table(results[:2]) == first.partition("\n")[2]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = {"task": "a", "index": 3, "prediction": "é"}
    write(tmp_path, [result("a", 60.0, records=[record])], {"subject": "s"})
    for path in (tmp_path, tmp_path / "results.json"):
        about, results = read_results(path)
        assert (about["subject"], results) == ("s", [result("a", 60.0)])
        assert read_predictions(path) == [record]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), r"has format 1, but only 2 is read; score again with eval/run\.py"),
        (lambda d: d.pop("format"), "has format None"),
        (lambda d: d.pop("results"), "is not complete: 'results'"),
        (lambda d: d["results"][0].pop("metrics"), "is not complete: .*metrics"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path, [result("a", 60.0)], {})
    document = json.loads((tmp_path / "results.json").read_text())
    change(document)
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        read_results(tmp_path)


def test_absent_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results at"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="a paired test needs it"):
        read_predictions(tmp_path)
    for name in ("results.json", "predictions.jsonl"):
        (tmp_path / name).write_text('{"format": 2')
    with pytest.raises(UserError, match="is not JSON"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="is not JSON, line by line"):
        read_predictions(tmp_path)
