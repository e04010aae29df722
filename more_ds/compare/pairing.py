"""Paired tests between two results, from their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from more_ds.compare.bootstrap import LEVEL, Paired, TaskPair, paired_mean_test, paired_test
from more_ds.compare.comparison import Row, System, commonest
from more_ds.compare.tables import Cell, Table
from more_ds.errors import UserError
from more_ds.metrics import METRICS
from more_ds.results import read_predictions


def paired_tables(systems: Sequence[System], *, all_metrics: bool = False, resamples: int = 1000) -> list[Table]:
    """A table for each suite: the first system's metrics less the second's, task by task, and of the mean.

    Args:
        systems: two, scored on the same examples.
        all_metrics: test each metric; else the primary alone.
        resamples: of the bootstrap.

    Raises:
        UserError: not two systems, no task in common, no predictions, or predictions for other examples.
    """
    if len(systems) != 2:
        names = ", ".join(system.name for system in systems)
        raise UserError(f"--paired compares two columns; found {len(systems)}: {names}; name two results")
    a, b = systems
    shared = [row for row in a.results if row in b.results]
    if not shared:
        raise UserError(f"--paired: {a.name} and {b.name} have no task and split in common; score the same tasks")
    pairs = _pairs(a, b, shared, all_metrics)
    title = f"{a.name} less {b.name}: paired bootstrap, {resamples:,} resamples, {LEVEL:.0%} interval, two-sided p"
    header = ["task", "metric", "difference", "from", "to", "p"]
    tables = []
    for suite in dict.fromkeys(row.suite for row in shared):
        own = {key: pair for key, pair in pairs.items() if key[0].suite == suite}
        main = commonest([row.split for row, _ in own])
        lines = [
            [Cell(row.label(main)), Cell(metric), *_cells(paired_test(*pair, resamples=resamples))]
            for (row, metric), pair in own.items()
        ]
        for split in dict.fromkeys(row.split for row, _ in own):
            primary = [p for (row, m), p in own.items() if row.split == split and m == a.results[row].primary]
            if len(primary) > 1:
                label = Row(suite, f"mean of {len(primary)}", split).label(main)
                lines.append([Cell(label), Cell(""), *_cells(paired_mean_test(primary, resamples))])
        tables.append(Table(f"{suite}, {main}: {title}", header, lines, 2, {}))
    return tables


def _pairs(a: System, b: System, rows: Sequence[Row], all_metrics: bool) -> dict[tuple[Row, str], TaskPair]:
    """The two systems' predictions by row and metric."""
    predictions = [_by_row(system) for system in (a, b)]
    pairs: dict[tuple[Row, str], TaskPair] = {}
    for row in rows:
        first, second = (found.get((row.task, row.split, system.results[row].mode), [])
                         for system, found in zip((a, b), predictions, strict=True))  # fmt: skip
        if [(r["index"], r["gold"]) for r in first] != [(r["index"], r["gold"]) for r in second]:
            raise UserError(
                f"--paired: {a.name} and {b.name} were scored on other examples of '{row.task}' ({row.split}): "
                f"{len(first)} and {len(second)}; score both on the same rows"
            )
        golds = [tuple(r["gold"]) if isinstance(r["gold"], list) else r["gold"] for r in first]
        answers = [[r["prediction"] for r in records] for records in (first, second)]
        for metric in a.results[row].metrics if all_metrics else [a.results[row].primary]:
            if metric not in METRICS:
                raise UserError(f"--paired: this version knows no metric '{metric}'; score again with eval/run.py")
            _check_belonging(row, metric, a, answers[0], golds)
            _check_belonging(row, metric, b, answers[1], golds)
            pairs[row, metric] = TaskPair(METRICS[metric].resampled, answers[0], answers[1], golds)
    return pairs


def _by_row(system: System) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """A system's records by task, split and mode, in the order of the examples."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in sorted(read_predictions(system.path), key=lambda record: record["index"]):
        found.setdefault((record["task"], record["split"], record["mode"]), []).append(record)
    return found


def _check_belonging(row: Row, metric: str, system: System, answers: Sequence[Any], golds: Sequence[Any]) -> None:
    """Refuse predictions that do not give the number that stands in the results beside them."""
    written = system.score(row, metric)
    found = METRICS[metric].fn(answers, golds) if golds else None
    if found is None or written is None or abs(found - written) > 0.01:
        raise UserError(
            f"the predictions beside {system.path} give {found} as {metric} of '{row.task}' ({row.split}), its results "
            f"say {written}; they are not of one evaluation: score again with eval/run.py"
        )


def _cells(result: Paired) -> list[Cell]:
    low, high = result.interval
    return [Cell(result.difference), Cell(low), Cell(high), Cell(result.p, decimals=4)]
