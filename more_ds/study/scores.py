"""Scores of a study's runs as tables: means and deviations over seeds, and paired tests against the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from more_ds.compare.bootstrap import LEVEL, RepeatedPair, repeated_mean_test
from more_ds.compare.comparison import Row, System, comparison_tables
from more_ds.compare.published import load_published
from more_ds.compare.tables import Cell, Table
from more_ds.metrics import METRICS
from more_ds.results import TaskResult, read_predictions, read_results
from more_ds.study.definition import Study
from more_ds.study.jobs import Job

RESAMPLES = 1000
Runs = dict[int, list[Job]]
"""Jobs by seed; several where a system is trained for each task alone."""


def by_arm(jobs: Sequence[Job], backbone: str) -> dict[str, Runs]:
    """The training jobs of a backbone by system and seed."""
    arms: dict[str, Runs] = {}
    for job in jobs:
        if job.backbone == backbone and job.source is None:
            arms.setdefault(job.arm, {}).setdefault(job.seed, []).append(job)
    return arms


def score_tables(study: Study, jobs: Sequence[Job]) -> list[Table]:
    """For each backbone the scores of all systems beside the published ones, and the tests against the baseline."""
    tables: list[Table] = []
    for backbone in dict.fromkeys(job.backbone for job in jobs):
        arms = by_arm(jobs, backbone)
        systems = [_system(name, runs) for name, runs in arms.items()]
        suites = {(row.suite, row.split) for system in systems for row in system.results}
        published = [
            column
            for column in (load_published(study.published) if study.published else [])
            if (column.suite, column.split) in suites
        ]
        count = len(next(iter(arms.values())))
        spread = f"± deviation over {count} seeds" if count > 1 else "± standard error over examples"
        for table in comparison_tables(systems, published):
            title = f"{study.name}, {backbone}, {table.title}: {study.about} ({spread})"
            tables.append(replace(table.transposed(), title=title))
        if study.baseline is not None and len(arms) > 1:
            tables.append(_tests(study, backbone, arms, count))
    return tables


def mean_scores(runs: Runs) -> list[float]:
    """The mean test score over tasks of each seed, in percent."""
    return [fmean(r.score for r in _scored(jobs) if r.split == "test") for jobs in runs.values()]


def _scored(jobs: Sequence[Job]) -> list[TaskResult]:
    return [result for job in jobs for result in read_results(job.results)[1]]


def _system(name: str, runs: Runs) -> System:
    """The means over the seeds; deviations where there are several seeds, else the errors of the one."""
    seeds = [{Row(r.suite, r.task, r.split): r for r in _scored(jobs)} for jobs in runs.values()]
    results = {row: _mean([seed[row] for seed in seeds]) for row in seeds[0]}
    splits = {row.split for row in results}
    errors: dict[str, float] = {}
    if len(seeds) > 1:
        errors = {
            split: stdev(fmean(r.score for row, r in seed.items() if row.split == split) for seed in seeds)
            for split in splits
        }
    return System(name, results, {}, next(iter(runs.values()))[0].results, errors)


def _mean(results: Sequence[TaskResult]) -> TaskResult:
    if len(results) == 1:
        return results[0]
    metrics = {name: fmean(r.metrics[name] for r in results) for name in results[0].metrics}
    spread = {name: stdev(r.metrics[name] for r in results) for name in metrics}
    return replace(results[0], metrics=metrics, standard_errors=spread)


def _tests(study: Study, backbone: str, arms: dict[str, Runs], seeds: int) -> Table:
    """Mean of the primary metrics of each system less the baseline's."""
    base = _answers(arms[str(study.baseline)])
    rows = []
    for name, runs in arms.items():
        if name == study.baseline:
            continue
        own = _answers(runs)
        pairs = [
            RepeatedPair(METRICS[key[2]].resampled, own[key][0], base[key][0], golds)
            for key, (_, golds) in base.items()
            if key in own and own[key][1] == golds
        ]
        if not pairs:
            continue
        found = repeated_mean_test(pairs, RESAMPLES)
        low, high = found.interval
        rows.append([Cell(name), Cell(found.difference), Cell(low), Cell(high), Cell(found.p, decimals=4)])
    title = (
        f"{study.name}, {backbone}: mean less that of {study.baseline}, over {seeds} seed{'s' * (seeds > 1)} of each; "
        f"paired bootstrap over the examples, {RESAMPLES:,} resamples, {LEVEL:.0%} interval, two-sided p"
    )
    return Table(title, ["system", "difference", "from", "to", "p"], rows, 1, {})


def _answers(runs: Runs) -> dict[tuple[str, str, str], tuple[list[list[Any]], list[Any]]]:
    """By task, split and primary metric: the predictions of each seed, and the right answers."""
    found: dict[tuple[str, str, str], tuple[list[list[Any]], list[Any]]] = {}
    for jobs in runs.values():
        for job in jobs:
            records: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for record in sorted(read_predictions(job.results), key=lambda record: record["index"]):
                records.setdefault((record["task"], record["split"]), []).append(record)
            for result in read_results(job.results)[1]:
                if result.split == "test":
                    own = records[result.task, result.split]
                    golds = [tuple(r["gold"]) if isinstance(r["gold"], list) else r["gold"] for r in own]
                    key = (result.task, result.split, result.primary)
                    found.setdefault(key, ([], golds))[0].append([r["prediction"] for r in own])
    return found
