"""Several results side by side: what may stand in one row, the best of it, and the means.

A number that was scored in another way than its row's others (other examples, prompts, kind of answer, variant of the
metric) carries a footnote and is never the best; so does a published one.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from more_ds.compare.published import Published
from more_ds.compare.tables import Cell, Table
from more_ds.errors import UserError
from more_ds.metrics import METRICS
from more_ds.results import LIKELIHOOD, TaskResult, read_results

T = TypeVar("T")


class Row(NamedTuple):
    """What systems are compared on."""

    suite: str
    task: str
    split: str

    def label(self, main: str) -> str:
        """The task, and the split where it is not the table's."""
        return self.task if self.split == main else f"{self.task} ({self.split})"


class Condition(NamedTuple):
    """How a number came about, in words, and by a hash where words do not tell all."""

    words: str
    key: str = ""

    def unlike(self, usual: Condition) -> str:
        """The footnote of a number whose row is usually scored otherwise."""
        if self.words == usual.words:
            return f"other {self.words} than the unmarked"
        return f"{self.words}; unmarked: {usual.words}"


@dataclass(frozen=True)
class System:
    """One column: a results file, or one mode of it where it holds two.

    Attributes:
        name: title of the column.
        results: by row.
        settings: of the scoring, as `eval/run.py` records them.
        path: the file or its folder.
        mean_errors: standard errors of the means by split; where there is none, the tasks' errors are taken as apart.
    """

    name: str
    results: Mapping[Row, TaskResult]
    settings: Mapping[str, Any]
    path: Path
    mean_errors: Mapping[str, float] = field(default_factory=dict)

    def score(self, row: Row, metric: str) -> float | None:
        """The metric in percent; None: not known."""
        return self.results[row].metrics.get(metric) if row in self.results else None

    def conditions(self, row: Row, metric: str) -> list[Condition]:
        """What the numbers of a row have to share."""
        result = self.results[row]
        return [
            Condition(f"answers {self._way(result.mode)}"),
            Condition(f"{result.n:,} examples", result.data),
            Condition("prompts", result.prompt),
            Condition(f"{metric} by {result.signatures.get(metric) or 'this package'}"),
        ]

    def _way(self, mode: str) -> str:
        routed = ", tasks inferred" if self.settings.get("infer_task") else ""
        if mode == LIKELIHOOD:
            per_token = " per token" if self.settings.get("length_normalised") else ""
            return f"ranked by likelihood{per_token}{routed}"
        beams = self.settings.get("num_beams", 1)
        return ("generated greedily" if beams == 1 else f"generated with {beams} beams") + routed


def load_systems(paths: Mapping[str, Path]) -> list[System]:
    """Read results files by the names of their columns.

    A file with closed answers in two modes becomes two columns; free text stands in both.

    Raises:
        UserError: see `read_results`.
    """
    systems: list[System] = []
    for name, path in paths.items():
        about, results = read_results(path)
        columns: dict[str, dict[Row, TaskResult]] = {}
        for mode in dict.fromkeys(result.mode for result in results):
            own: dict[Row, TaskResult] = {}
            for result in results:
                row = Row(result.suite, result.task, result.split)
                if row not in own or result.mode == mode:
                    own[row] = result
            if own not in columns.values():
                columns[mode] = own
        for mode, own in columns.items():
            title = f"{name} ({mode})" if len(columns) > 1 else name
            systems.append(System(title, own, about.get("settings", {}), path))
    return systems


def comparison_tables(
    systems: Sequence[System], published: Sequence[Published] = (), *, all_metrics: bool = False, decimals: int = 2
) -> list[Table]:
    """A table for each suite: a row for each task and split, then the means of the primary metrics.

    Args:
        systems: the first columns.
        published: the last columns; left out of suites and splits they do not belong to.
        all_metrics: a row for each metric; else for the primary alone.
        decimals: numbers that are the same when rounded to them are equally good.

    Raises:
        UserError: published numbers were given, but none belongs here.
    """
    rows = list(dict.fromkeys(row for system in systems for row in system.results))
    places = {(row.suite, row.split) for row in rows}
    belonging = [column for column in published if (column.suite, column.split) in places]
    if published and not belonging:
        known = ", ".join(sorted({f"{column.suite} ({column.split})" for column in published}))
        raise UserError(f"no published numbers for these results; there are some for: {known}; leave --paper out")
    suites = dict.fromkeys(row.suite for row in rows)
    return [
        _Suite(systems, [column for column in belonging if column.suite == suite], decimals).table(
            suite, [row for row in rows if row.suite == suite], all_metrics
        )
        for suite in suites
    ]


class _Suite:
    """The table of one suite while it is made, with its footnotes."""

    def __init__(self, systems: Sequence[System], published: Sequence[Published], decimals: int) -> None:
        self.systems, self.published, self.decimals = systems, published, decimals
        self.notes: dict[str, str] = {}

    def table(self, suite: str, rows: Sequence[Row], all_metrics: bool) -> Table:
        lines: list[list[Cell]] = []
        main = commonest([row.split for row in rows])
        by_split: dict[str, list[list[Cell]]] = {}
        for row in rows:
            primary, metrics = self._metrics(row)
            for metric in metrics if all_metrics else [primary]:
                cells = self._cells(row, metric, is_primary=metric == primary)
                lines.append([Cell(row.label(main)), Cell(metric), *self._with_best(cells, metric)])
                if metric == primary:
                    by_split.setdefault(row.split, []).append(cells)
        for split, scores in by_split.items():
            if len(scores) > 1:
                tasks = {row.task for row in rows if row.split == split}
                cells = self._means(scores, tasks, split)
                label = Row(suite, f"mean of {len(scores)}", split).label(main)
                lines.append([Cell(label), Cell(""), *self._with_best(cells, None)])
        names = [system.name for system in self.systems] + [f"{column.system} (published)" for column in self.published]
        notes = {mark: text for text, mark in self.notes.items()}
        return Table(f"{suite}, {main}", ["task", "metric", *names], lines, 2, notes)

    def _metrics(self, row: Row) -> tuple[str, list[str]]:
        """The primary metric of most systems, and all metrics, the primary first."""
        results = [system.results[row] for system in self.systems if row in system.results]
        primary = commonest([result.primary for result in results])
        return primary, list(dict.fromkeys([primary, *(name for result in results for name in result.metrics)]))

    def _cells(self, row: Row, metric: str, *, is_primary: bool) -> list[Cell]:
        known = [system for system in self.systems if system.score(row, metric) is not None]
        found = {system.name: system.conditions(row, metric) for system in known}
        usual = [commonest(conditions) for conditions in zip(*found.values(), strict=True)]
        cells = []
        for system in self.systems:
            pairs = zip(found.get(system.name, usual), usual, strict=True)
            marks = "".join(self._mark(own.unlike(other)) for own, other in pairs if own != other)
            error = system.results[row].standard_errors.get(metric) if system in known else None
            cells.append(Cell(system.score(row, metric), error, marks))
        for column in self.published:
            score = column.scores.get(row.task) if is_primary and row.split == column.split else None
            cells.append(Cell(score, marks=self._mark(column.source) if score is not None else ""))
        return cells

    def _means(self, scores: Sequence[Sequence[Cell]], tasks: set[str], split: str) -> list[Cell]:
        """The mean of every column that has all scores; the tasks share no examples, so their errors are apart."""
        means = []
        for system, cells in zip(self.systems, zip(*scores, strict=True), strict=False):
            values = [cell.value for cell in cells if isinstance(cell.value, float)]
            errors = [cell.error for cell in cells if cell.error is not None]
            if len(values) < len(cells):
                means.append(Cell(None))
                continue
            apart = math.hypot(*errors) / len(cells) if len(errors) == len(cells) else None
            error = system.mean_errors.get(split, apart)
            means.append(Cell(fmean(values), error, "".join(sorted({mark for cell in cells for mark in cell.marks}))))
        for column in self.published:
            if split != column.split:
                means.append(Cell(None))
                continue
            marks = self._mark(column.source)
            if set(column.tasks) != tasks:
                marks += self._mark(f"mean of {len(column.tasks)} tasks: {', '.join(column.tasks)}")
            means.append(Cell(column.mean, marks=marks))
        return means

    def _mark(self, text: str) -> str:
        """The letter of a footnote."""
        if text not in self.notes and len(self.notes) == len(string.ascii_letters):
            raise UserError("more than 52 footnotes are needed: these results have little in common; compare fewer")
        return self.notes.setdefault(text, string.ascii_letters[len(self.notes) % len(string.ascii_letters)])

    def _with_best(self, cells: Sequence[Cell], metric: str | None) -> list[Cell]:
        """Mark the best of the numbers without footnotes, if they differ."""
        shown = [self._shown(cell) for cell in cells if not cell.marks]
        values = [value for value in shown if value is not None]
        if len(set(values)) < 2 or (metric is not None and metric not in METRICS):
            return list(cells)
        best = max(values) if metric is None or METRICS[metric].higher_is_better else min(values)
        return [replace(cell, is_best=not cell.marks and self._shown(cell) == best) for cell in cells]

    def _shown(self, cell: Cell) -> float | None:
        return round(cell.value, self.decimals) if isinstance(cell.value, float) else None


def commonest(values: Sequence[T]) -> T:
    """The value that occurs most often; a tie goes to the first."""
    return Counter(values).most_common(1)[0][0]
