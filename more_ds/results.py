"""The result of an evaluation: what it holds, its table, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from more_ds import log
from more_ds.errors import UserError

FORMAT = 2
"""Version of `results.json`."""
RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"

GENERATION = "generation"
LIKELIHOOD = "likelihood"


@dataclass(frozen=True)
class TaskResult:
    """What one task scored on one split.

    Attributes:
        task: name of the task.
        suite: name of its suite.
        split: `validation`, `test` or an extra test.
        mode: `likelihood` or `generation`.
        metrics: by name, in percent, in the task's order.
        standard_errors: of the metrics, by name, in percent, over bootstrap resamples; without those not computed.
        signatures: of the metrics, by name: settings, library, version.
        primary: name of the metric that stands for the task.
        n: number of examples.
        unparsable: generated answers that are none of the options.
        cut: prompts that were longer than the model may read.
        majority: the metrics of the majority answer; None where the training answers are not known.
        prompt: hash of the templates and answers that made the prompts and targets (`render.prompt_hash`).
        data: hash of the examples' numbers and right answers.
        task_found: examples whose task was inferred right, in percent; None: it was told, or cannot be right.
        records: one mapping an example: task, split, mode, index, prompt, options, scores, text, prediction, gold.
    """

    task: str
    suite: str
    split: str
    mode: str
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    signatures: dict[str, str]
    primary: str
    n: int
    unparsable: int
    cut: int
    majority: dict[str, float] | None
    prompt: str
    data: str
    records: list[dict[str, Any]]
    task_found: float | None = None

    @property
    def score(self) -> float:
        """The primary metric, in percent."""
        return self.metrics[self.primary]


def mean_score(results: Sequence[TaskResult]) -> float:
    """The unweighted mean of the tasks' primary metrics, in percent."""
    return fmean(result.score for result in results)


def mean_error(results: Sequence[TaskResult]) -> float | None:
    """The standard error of `mean_score`, for tasks that share no examples; None where one task has none."""
    errors = [result.standard_errors.get(result.primary) for result in results]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def result_table(results: Sequence[TaskResult]) -> str:
    """A table for each suite: a line a metric, the primary first, and the mean of every split and mode.

    The mean is that of the tasks' primary metrics, each task with the same weight, as the MoRE paper and the GLUE
    leaderboard print it; a task's further test splits have their own. Columns without anything to say are left out.
    """
    suites: dict[str, list[TaskResult]] = {}
    for result in results:
        suites.setdefault(result.suite, []).append(result)
    tables = [(name, _suite_table(part)) for name, part in suites.items()]
    return "\n\n".join(f"{name}\n{text}" if len(tables) > 1 else text for name, text in tables)


def write_results(folder: Path, results: Sequence[TaskResult], about: Mapping[str, Any]) -> None:
    """Write `predictions.jsonl`, one line an example, and `results.json`: `about` and everything but the records."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        for result in results:
            for record in result.records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    write_summary(folder / RESULTS, results, about)


def write_summary(path: Path, results: Sequence[TaskResult], about: Mapping[str, Any]) -> None:
    """Write what `read_results` reads: `about`, and the results without their records."""
    kept = [f.name for f in fields(TaskResult) if f.name != "records"]
    summary = [{name: getattr(result, name) for name in kept} for result in results]
    text = json.dumps({"format": FORMAT, **about, "results": summary}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_results(path: Path) -> tuple[dict[str, Any], list[TaskResult]]:
    """Read a `results.json`, or that of a folder: what it says of the scoring, and the results without records.

    Raises:
        UserError: no such file, a damaged one, or one of another version of the format.
    """
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no results at {path}; name a folder that eval/run.py has written, or its {RESULTS}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; score again with eval/run.py") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, but only {FORMAT} is read; score again with eval/run.py")
    try:
        results = [TaskResult(**entry, records=[]) for entry in document.pop("results")]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not complete: {error}; score again with eval/run.py") from error
    return document, results


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read the records beside a `results.json` (or in a folder).

    Raises:
        UserError: they are missing or damaged.
    """
    path = (path if path.is_dir() else path.parent) / PREDICTIONS
    if not path.is_file():
        raise UserError(f"no {PREDICTIONS} in {path.parent}; a paired test needs it: copy it there, or score again")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is not JSON, line by line: {error}; score again with eval/run.py") from error


def _suite_table(results: Sequence[TaskResult]) -> str:
    rows = [row for result in results for row in _metric_rows(result)]
    rows += [_mean_row(part) for part in _comparable(results) if len(part) > 1]
    header = ["task", "metric", "value", "+/-", "majority", "n"]
    header[1:1] = [key for key in ("split", "mode") if len({row[key] for row in rows}) > 1]
    header += [key for key in ("unparsable", "cut") if any(row.get(key) for row in rows)]
    header += ["task_found"] * any(row.get("task_found") is not None for row in rows)
    if all(row.get("+/-") is None for row in rows):
        header.remove("+/-")
    return log.table(header, [[row.get(key) for key in header] for row in rows])


def _metric_rows(result: TaskResult) -> list[dict[str, Any]]:
    names = sorted(result.metrics, key=lambda name: name != result.primary)
    common = {key: getattr(result, key) for key in ("task", "split", "mode", "n", "unparsable", "cut", "task_found")}
    return [
        common
        | {"metric": name, "value": result.metrics[name], "majority": (result.majority or {}).get(name)}
        | {"+/-": result.standard_errors.get(name)}
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
        "+/-": mean_error(part),
        "majority": fmean(majority) if len(majority) == len(part) else None,
        "n": sum(result.n for result in part),
    }
