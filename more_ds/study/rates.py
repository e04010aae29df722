"""The learning rate of every system, from the same rates for all, by validation scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from more_ds.compare.tables import Cell, Table
from more_ds.errors import UserError
from more_ds.reporting.record import read_run
from more_ds.study.definition import Study
from more_ds.study.jobs import Job, Rates, make_jobs

SEED = 0


def search_jobs(
    study: Study,
    scale: Mapping[str, Any],
    rates: Sequence[float],
    flags: Mapping[str, Any],
    output: Path,
    ds_config: str | None,
) -> list[Job]:
    """One run of every system at every rate, with seed 0; see `make_jobs`.

    Raises:
        UserError: the study compares something else than trained systems, a rate is given twice or besides, or what
            `make_jobs` refuses.
    """
    if study.kind != "train":
        raise UserError(f"--rates: study '{study.name}' compares no scores of trained systems; leave it out")
    if "learning_rate" in flags:
        raise UserError("--learning_rate after --, beside --rates: name it among the rates, or leave one out")
    if len(set(rates)) < len(rates):
        raise UserError(f"--rates {','.join(map(str, rates))}: a rate is named twice")
    fixed = [arm.name for arm in study.arms if "learning_rate" in arm.run]
    if fixed:
        raise UserError(f"--rates: {', '.join(fixed)} of study '{study.name}' sets a rate of its own; see --systems")
    return [
        job
        for rate in rates
        for job in make_jobs(study, scale, SEED + 1, {**flags, "learning_rate": rate}, output, ds_config)
    ]


def best_rates(jobs: Sequence[Job]) -> Rates:
    """By backbone and system, the rate whose best validation score is highest; the lower of two that are level."""
    return {system: max(sorted(found), key=found.__getitem__) for system, found in _scores(jobs).items()}


def rates_table(study: Study, jobs: Sequence[Job]) -> Table:
    """The best mean validation score of every system at every rate; where the first or last is best, it says so."""
    scores = _scores(jobs)
    chosen, rates = best_rates(jobs), sorted({rate for found in scores.values() for rate in found})
    edges = {rates[0], rates[-1]} if len(rates) > 1 else set()
    rows = []
    for system, found in scores.items():
        best = chosen[system]
        cells = [Cell(found[rate], is_best=rate == best, marks="a" * (rate == best in edges)) for rate in rates]
        rows.append([Cell(", ".join(system)), *cells])
    note = "the best rate is the least or greatest that was tried; a better one may lie beyond"
    title = f"{study.name}: best mean validation score by learning rate, seed {SEED}; the other seeds train at the best"
    marked = any(cell.marks for row in rows for cell in row)
    return Table(title, ["system", *(f"{rate:g}" for rate in rates)], rows, 1, {"a": note} if marked else {})


def _scores(jobs: Sequence[Job]) -> dict[tuple[str, str], dict[float, float]]:
    """By backbone and system, then rate: the mean over its runs, several where each task is trained alone."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for job in jobs:
        rows = read_run(job.folder, job.id).with_key("evaluation")
        own = found.setdefault((job.backbone, job.arm), {})
        rate = float((job.recipe or {})["learning_rate"])
        own.setdefault(rate, []).append(max(row["mean_score"] for row in rows))
    return {system: {rate: fmean(own) for rate, own in rates.items()} for system, rates in found.items()}
