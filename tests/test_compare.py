"""Results side by side: what shares a column, the best, the means, published numbers, and the paired test."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_results import result

from more_ds.compare.tables import Cell, Table, as_latex, as_markdown, as_text
from more_ds.metrics import METRICS
from more_ds.results import TaskResult, write_results

ROOT = Path(__file__).resolve().parents[1]
GOLD = [0, 1] * 50
Compare = Callable[..., str]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_compare", ROOT / "eval" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_compare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shown(compare: ModuleType, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run the command: what it prints."""

    def run(*arguments: Any) -> str:
        code = compare.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == (2 if err else 0)
        assert len(err.splitlines()) <= 1
        return err or out

    return run


def scored(task: str, hits: int, **changes: Any) -> TaskResult:
    """100 examples of which the first `hits` are right, with their records."""
    found = [gold if i < hits else 1 - gold for i, gold in enumerate(GOLD)]
    metrics = {name: METRICS[name].fn(found, GOLD) for name in ("accuracy", "f1")}
    place = {"task": task, "split": changes.get("split", "test"), "mode": changes.get("mode", "likelihood")}
    records = [
        place | {"index": i, "prediction": p, "gold": g} for i, (p, g) in enumerate(zip(found, GOLD, strict=True))
    ]
    return result(task, 0.0, metrics=metrics, records=records, **changes)


def write(folder: Path, *results: TaskResult, **settings: Any) -> Path:
    write_results(folder, results, {"settings": settings})
    return folder


def cells(text: str, label: str) -> list[str]:
    """The numbers of a row of the printed table."""
    line = next(line for line in text.splitlines() if line.startswith(f"{label} "))
    return [part for part in re.split(r"\s{2,}", line)[1:] if re.match(r"-?\d|-$", part)]


def test_columns_best_and_mean(tmp_path: Path, shown: Compare) -> None:
    write(tmp_path / "runs" / "a" / "eval", scored("x", 80), scored("y", 60))
    write(tmp_path / "runs" / "b" / "eval", scored("x", 70), scored("y", 66), scored("z", 50, split="hard"))
    text = shown(tmp_path / "runs/a/eval", tmp_path / "runs/b/eval/results.json")
    lines = text.splitlines()
    assert lines[0] == "toy, test"
    assert re.split(r"\s{2,}", lines[1]) == ["task", "metric", "a", "b"]
    assert cells(text, "x") == ["80.00 ± 1.50*", "70.00 ± 1.50"]
    assert cells(text, "y") == ["60.00 ± 1.50", "66.00 ± 1.50*"]
    assert cells(text, "z (hard)") == ["-", "50.00 ± 1.50"]
    error = f"{1.5 * math.sqrt(2) / 2:.2f}"
    assert cells(text, "mean of 2") == [f"70.00 ± {error}*", f"68.00 ± {error}"]
    assert "f1" not in text
    assert "f1" in shown(tmp_path / "runs/a/eval", "--all_metrics")
    transposed = shown(f"A={tmp_path}/runs/a/eval", f"B={tmp_path}/runs/b/eval", "--transpose", "--decimals", 0)
    assert [line.split()[:2] for line in transposed.splitlines()[3:]] == [["A", "80"], ["B", "70"]]


def test_a_mean_needs_every_task(tmp_path: Path, shown: Compare) -> None:
    a, b = write(tmp_path / "a", scored("x", 80), scored("y", 60)), write(tmp_path / "b", scored("x", 70))
    assert cells(shown(a, b), "mean of 2") == ["70.00 ± 1.06", "-"]


@pytest.mark.parametrize(
    ("change", "settings", "note"),
    [
        ({"n": 99, "data": "other"}, {}, "99 examples; unmarked: 100 examples"),
        ({"data": "other"}, {}, "other 100 examples than the unmarked"),
        ({"prompt": "q"}, {}, "other prompts than the unmarked"),
        ({"signatures": {"accuracy": "x:2"}}, {}, "accuracy by x:2; unmarked: accuracy by x:1"),
        ({"mode": "generation"}, {}, "answers generated greedily; unmarked: answers ranked by likelihood"),
        ({"mode": "generation"}, {"num_beams": 4}, "answers generated with 4 beams; unmarked: "),
        ({}, {"length_normalised": True}, "answers ranked by likelihood per token; unmarked: "),
    ],
)
def test_numbers_of_another_kind_are_marked_and_never_the_best(
    tmp_path: Path, shown: Compare, change: dict[str, Any], settings: dict[str, Any], note: str
) -> None:
    odd = write(tmp_path / "odd", scored("x", 90, **change), **settings)
    others = [write(tmp_path / name, scored("x", hits)) for name, hits in (("b", 70), ("c", 60))]
    text = shown(odd, *others)
    assert cells(text, "x") == ["90.00 ± 1.50 a", "70.00 ± 1.50*", "60.00 ± 1.50"]
    assert text.splitlines()[-1].startswith(f"a: {note}")


def test_two_modes_of_one_file_are_two_columns(tmp_path: Path, shown: Compare) -> None:
    both = write(
        tmp_path / "a", scored("x", 80), scored("t", 50, mode="generation"), scored("x", 60, mode="generation")
    )
    text = shown(both)
    assert re.split(r"\s{2,}", text.splitlines()[1])[2:] == [f"{both} (likelihood)", f"{both} (generation)"]
    assert cells(text, "x") == ["80.00 ± 1.50", "60.00 ± 1.50 a"]
    assert cells(text, "t") == ["50.00 ± 1.50", "50.00 ± 1.50"]
    assert "likelihood" not in shown(write(tmp_path / "b", scored("x", 80), scored("t", 50, mode="generation")))


def test_published_numbers(tmp_path: Path, shown: Compare) -> None:
    tasks = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
    whole = write(tmp_path / "whole", *(scored(task, 95, suite="glue") for task in tasks))
    text = shown(whole, "--paper")
    assert cells(text, "mean of 8")[-5:] == ["87.30 b", "86.70 b", "86.20 a", "86.20 a", "87.00 c"]
    assert cells(text, "rte") == ["95.00 ± 1.50", "-", "-", "77.70 a", "-", "-"]
    assert "*" not in text
    few = write(tmp_path / "few", *(scored(task, 95, suite="glue") for task in tasks[:2]))
    text = shown(few, "--paper", "ablation")
    assert cells(text, "mean of 2")[-7:-5] == ["87.30 ab", "87.00 ab"]
    assert "b: mean of 8 tasks: cola, mnli" in text
    other = write(tmp_path / "other", scored("x", 50))
    assert "no published numbers for these results; there are some for: glue (test)" in shown(other, "--paper")


def test_the_paired_test(tmp_path: Path, shown: Compare) -> None:
    a = write(tmp_path / "a", scored("x", 90), scored("y", 70), scored("x", 60, split="hard"))
    b = write(tmp_path / "b", scored("x", 70), scored("y", 70))
    rows = json.loads(shown(a, b, "--paired", "--format", "json"))[1]["rows"]
    assert [row["task"] for row in rows] == ["x", "y", "mean of 2"]
    assert [row["difference"]["value"] for row in rows] == pytest.approx([20.0, 0.0, 10.0])
    assert [row["p"]["value"] for row in rows] == [1 / 1001, 1.0, 1 / 1001]
    # 20 of 100 examples differ: the standard error of the difference is sqrt(0.2 * 0.8 / 100) = 4 points.
    assert rows[0]["from"]["value"] == pytest.approx(20 - 1.96 * 4, abs=1.5)
    assert "p\n" in shown(a, b, "--paired", "--resamples", 20)


def test_a_paired_test_needs_the_same_examples(tmp_path: Path, shown: Compare) -> None:
    a, b, c = write(tmp_path / "a", scored("x", 90)), write(tmp_path / "b", scored("x", 70)), tmp_path / "c"
    assert "compares two columns; found 1" in shown(a, "--paired")
    assert "no task and split in common" in shown(a, write(c, scored("y", 70)), "--paired")
    lines = (b / "predictions.jsonl").read_text().splitlines(keepends=True)
    (b / "predictions.jsonl").write_text("".join(lines[:-1]))
    assert "other examples of 'x' (test): 100 and 99; score both on the same rows" in shown(a, b, "--paired")
    (b / "predictions.jsonl").write_text("".join((a / "predictions.jsonl").read_text()))
    assert "give 90.0 as accuracy of 'x' (test), its results say 70.0" in shown(a, b, "--paired")
    (b / "predictions.jsonl").unlink()
    assert "a paired test needs it" in shown(a, b, "--paired")


def test_names_of_columns(tmp_path: Path, shown: Compare) -> None:
    place = write(tmp_path / "lr=3", scored("x", 90))
    assert shown(place).splitlines()[1].endswith(str(place))
    assert shown(f"mine={place}").splitlines()[1].endswith("  mine")
    assert "two columns have the same name" in shown(f"a={place}", f"a={place}")
    assert "no results at" in shown(tmp_path / "none")
    assert "'0' is not a positive number" in shown(place, "--resamples", "0")


@pytest.mark.parametrize(("name", "start"), [("t.md", "**toy, test**"), ("t.tex", "% toy, test"), ("t.json", "[")])
def test_a_file_is_written_in_the_form_of_its_suffix(tmp_path: Path, shown: Compare, name: str, start: str) -> None:
    place = write(tmp_path / "a", scored("x", 90))
    assert shown(place, "--output", tmp_path / "deep" / name) == f"written to {tmp_path}/deep/{name}\n"
    assert (tmp_path / "deep" / name).read_text().startswith(start)


TABLE = Table(
    "my_suite",
    ["task", "metric", "a_b", "c"],
    [
        [Cell("50% | x"), Cell("f1"), Cell(1.0, 0.25, is_best=True), Cell(0.5, None, "ab")],
        [Cell("y"), Cell(""), Cell(None), Cell(0.12345, decimals=4)],
    ],
    2,
    {"a": "other & more", "b": "_"},
)  # fmt: skip


def test_text() -> None:
    assert [line.rstrip() for line in as_text(TABLE, 1).splitlines()] == [
        "my_suite",
        "task     metric  a_b         c",
        "-------  ------  ----------  ------",
        "50% | x  f1      1.0 ± 0.2*  0.5 ab",
        "y                -           0.1235",
        "a: other & more",
        "b: _",
    ]


def test_markdown() -> None:
    assert as_markdown(TABLE, 2).splitlines() == [
        r"**my\_suite**",
        "",
        r"| task | metric | a\_b | c |",
        "| :-- | :-- | --: | --: |",
        r"| 50% \| x | f1 | **1.00** ± 0.25 | 0.50 <sup>ab</sup> |",
        "| y |  | – | 0.1235 |",
        "",
        "<sup>a</sup> other & more  ",
        r"<sup>b</sup> \_  ",
    ]


def test_latex() -> None:
    assert as_latex(TABLE, 2).splitlines() == [
        "% my_suite",
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"task & metric & a\_b & c \\",
        r"\midrule",
        r"50\% | x & f1 & \textbf{1.00} {\scriptsize $\pm$ 0.25} & 0.50\textsuperscript{ab} \\",
        r"y &  & -- & 0.1235 \\",
        r"\bottomrule",
        r"\multicolumn{4}{l}{\footnotesize \textsuperscript{a} other \& more} \\",
        r"\multicolumn{4}{l}{\footnotesize \textsuperscript{b} \_} \\",
        r"\end{tabular}",
    ]
