"""What changed over training, as charts of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from more_ds.reporting.record import Row, RunRecord
from more_ds.reporting.svg import Panel, panels

POINTS = 200
"""Most points of a curve; more rows than that are averaged in equal parts."""
_CURVES = {
    "loss per label token": lambda row: row["loss_lm"],
    "the method's own loss (contrastive)": lambda row: row["loss_auxiliary"] or None,  # most methods have none
    "gradient norm": lambda row: row["grad_norm"],
    "learning rate": lambda row: row["learning_rate"],
}
Lines = dict[str, tuple[list[float], list[float]]]


def training(records: Sequence[RunRecord]) -> str:
    """Losses, gradient norm and learning rate."""
    charts = [Panel(title, _lines(records, "loss", read)) for title, read in _CURVES.items()]
    return _grid(charts, height=2.0)


def losses_by_task(records: Sequence[RunRecord]) -> str:
    """A chart of the loss for each task."""
    return _grid([Panel(task, _lines(records, "loss", _task_loss(task))) for task in _tasks(records)])


def scores_by_task(records: Sequence[RunRecord]) -> str:
    """A chart of the validation metric for each task, the mean of all first."""
    charts = [Panel("mean", _lines(records, "evaluation", lambda row: row["mean_score"]))]
    for task in _tasks(records):
        metric = next(r.plan["tasks"][task]["metric"] for r in records if task in r.plan["tasks"])
        charts.append(Panel(f"{task}: {metric}", _lines(records, "evaluation", _task_score(task, metric))))
    return _grid(charts)


def gates_overlaid(records: Sequence[RunRecord]) -> str:
    """Mean rank, entropy and ranks in use, over all tasks."""
    reads: dict[str, Callable[[Row], Any]] = {
        "mean rank": lambda row: fmean(row["gates"]["mean_rank"].values()),
        "mean entropy, nats": lambda row: fmean(row["gates"]["mean_entropy"].values()),
        "ranks in use, mean over maps": lambda row: row["gates"]["distinct_ranks"],
    }
    return _grid([Panel(title, _lines(records, "gates", read)) for title, read in reads.items()], columns=3)


def speed(records: Sequence[RunRecord]) -> str:
    """Throughput and memory."""
    reads: dict[str, Callable[[Row], Any]] = {
        "tokens per second": lambda row: row["tokens_per_second"],
        "padding, %": lambda row: 100 * row["padding"],
        "peak memory, GB": lambda row: row["peak_memory_gb"],
    }
    return _grid([Panel(title, _lines(records, "loss", read)) for title, read in reads.items()], columns=3)


def gradient_norms(record: RunRecord) -> str:
    """Norm of each task's gradient, and its mean cosine with the others', over training."""
    rows = record.with_key("gradients")
    steps = [row["step"] for row in rows]
    norms = {task: (steps, [row["gradients"]["norm"][task] for row in rows]) for task in record.tasks}
    cosines: Lines = {}
    for task in record.tasks:
        known = [(step, cosine) for step, row in zip(steps, rows, strict=True)
                 if (cosine := _mean_cosine(row["gradients"]["cosine"], task)) is not None]  # fmt: skip
        cosines[task] = ([step for step, _ in known], [cosine for _, cosine in known])
    return panels([Panel("gradient norm", norms, log=True), Panel("mean cosine with other tasks", cosines)], columns=2)


def cosine(table: Mapping[str, Mapping[str, float | None]], one: str, other: str) -> float | None:
    """The cosine of two tasks' gradients, which is noted once for the pair; 1 for a task with itself."""
    return 1.0 if one == other else table.get(one, {}).get(other, table.get(other, {}).get(one))


def _mean_cosine(table: Mapping[str, Mapping[str, float | None]], task: str) -> float | None:
    others = {*table, *(name for row in table.values() for name in row)} - {task}
    known = [value for other in sorted(others) if (value := cosine(table, task, other)) is not None]
    return fmean(known) if known else None


def _grid(charts: Sequence[Panel], columns: int = 4, height: float = 1.7) -> str:
    """The charts that have lines; empty if none has."""
    known = [chart for chart in charts if chart.lines]
    return panels(known, columns=columns, height=height) if known else ""


def _lines(records: Sequence[RunRecord], key: str, read: Callable[[Row], Any]) -> Lines:
    """A line for each run that knows the value at all; rows without it are left out."""
    found: Lines = {}
    for record in records:
        known = [(row["step"], value) for row in record.with_key(key) if (value := _value(read, row)) is not None]
        if known:
            found[record.name] = _thinned(known)
    return found


def _value(read: Callable[[Row], Any], row: Row) -> float | None:
    try:
        value = read(row)
    except KeyError:
        return None
    return None if value is None else float(value)


def _thinned(known: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = -(-len(known) // POINTS)
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    return [part[-1][0] for part in parts], [fmean(value for _, value in part) for part in parts]


def _task_loss(task: str) -> Callable[[Row], Any]:
    return lambda row: row["tasks"][task]["loss"]


def _task_score(task: str, metric: str) -> Callable[[Row], Any]:
    return lambda row: row["evaluation"][task][metric]


def _tasks(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(task for record in records for task in record.tasks))
