"""The result of an evaluation: what it holds, its table, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from more_ds import log

FORMAT = 1
"""Version of `results.json`."""

GENERATION = "generation"
LIKELIHOOD = "likelihood"


@dataclass(frozen=True)
class TaskResult:
    """What one task scored on one split.

    Attributes:
        task: name of the task.
        split: `validation`, `test` or an extra test.
        mode: `likelihood` or `generation`.
        metrics: by name, in percent, in the task's order.
        primary: name of the metric that stands for the task.
        n: number of examples.
        unparsable: generated answers that are none of the options.
        cut: prompts that were longer than the model may read.
        majority: the metrics of the majority answer; None where the training answers are not known.
        standard_error: of the primary metric, in percent, over bootstrap resamples; None: not computed.
        task_found: examples whose task was inferred right, in percent; None: it was told, or cannot be right.
        records: one mapping an example: task, split, mode, index, prompt, options, scores, text, prediction, gold.
    """

    task: str
    split: str
    mode: str
    metrics: dict[str, float]
    primary: str
    n: int
    unparsable: int
    cut: int
    majority: dict[str, float] | None
    standard_error: float | None
    records: list[dict[str, Any]]
    task_found: float | None = None

    @property
    def score(self) -> float:
        """The primary metric, in percent."""
        return self.metrics[self.primary]


def mean_score(results: Sequence[TaskResult]) -> float:
    """The unweighted mean of the tasks' primary metrics, in percent."""
    return fmean(result.score for result in results)


def result_table(results: Sequence[TaskResult]) -> str:
    """One line a metric, the primary first, and the mean of the primary metrics of every split and mode.

    Columns without anything to say are left out.
    """
    rows = [row for result in results for row in _metric_rows(result)]
    rows += [_mean_row(part) for part in _comparable(results) if len(part) > 1]
    header = ["task", "metric", "value", "+/-", "majority", "n"]
    header[1:1] = [key for key in ("split", "mode") if len({row[key] for row in rows}) > 1]
    header += [key for key in ("unparsable", "cut") if any(row.get(key) for row in rows)]
    header += ["task_found"] * any(row.get("task_found") is not None for row in rows)
    if all(row.get("+/-") is None for row in rows):
        header.remove("+/-")
    return log.table(header, [[row.get(key) for key in header] for row in rows])


def write_results(folder: Path, results: Sequence[TaskResult], about: Mapping[str, Any]) -> None:
    """Write `predictions.jsonl`, one line an example, and `results.json`: `about` and everything but the records."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for result in results:
            for record in result.records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    kept = [f.name for f in fields(TaskResult) if f.name != "records"]
    summary = [{name: getattr(result, name) for name in kept} for result in results]
    document = {"format": FORMAT, **about, "results": summary}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def _metric_rows(result: TaskResult) -> list[dict[str, Any]]:
    names = sorted(result.metrics, key=lambda name: name != result.primary)
    common = {key: getattr(result, key) for key in ("task", "split", "mode", "n", "unparsable", "cut", "task_found")}
    return [
        common
        | {"metric": name, "value": result.metrics[name], "majority": (result.majority or {}).get(name)}
        | {"+/-": result.standard_error if name == result.primary else None}
        for name in names
    ]


def _comparable(results: Sequence[TaskResult]) -> list[list[TaskResult]]:
    """The results that belong in one mean: of one split, each task in one mode (free text has only one)."""
    groups: list[list[TaskResult]] = []
    for split, mode in dict.fromkeys((result.split, result.mode) for result in results):
        by_task: dict[str, TaskResult] = {}
        for result in results:
            if result.split == split and (result.task not in by_task or result.mode == mode):
                by_task[result.task] = result
        if list(by_task.values()) not in groups:
            groups.append(list(by_task.values()))
    return groups


def _mean_row(part: Sequence[TaskResult]) -> dict[str, Any]:
    majority = [result.majority[result.primary] for result in part if result.majority is not None]
    return {
        "task": f"mean of {len(part)}",
        "split": part[0].split,
        "mode": part[0].mode,
        "metric": "primary",
        "value": mean_score(part),
        "majority": fmean(majority) if len(majority) == len(part) else None,
        "n": sum(result.n for result in part),
    }
