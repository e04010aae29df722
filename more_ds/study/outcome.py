"""What comes out of a study: tables in Markdown, LaTeX, HTML and JSON, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from more_ds.compare.tables import FORMATS, Table, as_html, as_json
from more_ds.reporting.embeddings import embedding_section
from more_ds.reporting.gates import gate_section
from more_ds.reporting.html import page, section
from more_ds.reporting.record import read_run
from more_ds.reporting.svg import Spread, spreads
from more_ds.study.definition import Study
from more_ds.study.jobs import Job
from more_ds.study.other import count_table, scaling_table, speed_table, transfer_table
from more_ds.study.scores import by_arm, mean_scores, score_tables

SUFFIXES = {"table": "txt", "markdown": "md", "latex": "tex"}


def tables_of(study: Study, jobs: Sequence[Job], scale: Mapping[str, Any], flags: Mapping[str, Any]) -> list[Table]:
    """The tables of a study whose jobs are all done."""
    if study.kind == "count":
        return [count_table(study, scale, flags)]
    if study.kind == "transfer":
        return [transfer_table(study, jobs)]
    if study.kind == "scaling":
        return [scaling_table(study, jobs)]
    if study.kind == "speed":
        return [speed_table(study, jobs)]
    return score_tables(study, jobs)


def write_outcome(folder: Path, study: Study, jobs: Sequence[Job], tables: Sequence[Table], decimals: int = 2) -> None:
    """Write `table.txt`, `.md`, `.tex`, `.json`, and `index.html` with the tables and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for form, suffix in SUFFIXES.items():
        text = "\n\n".join(FORMATS[form](table, decimals) for table in tables)
        (folder / f"table.{suffix}").write_text(text + "\n", encoding="utf-8")
    (folder / "table.json").write_text(as_json(tables) + "\n", encoding="utf-8")
    parts = [f'<div class="wide">{as_html(table, decimals)}</div>' for table in tables]
    whole = page(f"{study.name}: {study.about}", [section("Results", *parts), *_pictures(study, jobs)])
    (folder / "index.html").write_text(whole, encoding="utf-8")


def _pictures(study: Study, jobs: Sequence[Job]) -> list[str]:
    parts = [_curves(study, jobs)]
    if study.kind in ("scaling", "embeddings"):
        for group, job in enumerate(job for job in jobs if job.source is None):
            record = read_run(job.folder, f"{job.arm}, {job.backbone}")
            gates = gate_section(record, group) if study.kind == "scaling" else ""
            parts += [gates, embedding_section(record.adapter, record.tasks)]
    return parts


def _curves(study: Study, jobs: Sequence[Job]) -> str:
    """The mean score along each curve of the study, with its deviation over the seeds."""
    charts: dict[str, dict[str, list[Spread]]] = {}
    for backbone in dict.fromkeys(job.backbone for job in jobs):
        arms = by_arm(jobs, backbone)
        for arm in study.arms:
            if arm.curve is not None and arm.x is not None and arm.name in arms:
                means = mean_scores(arms[arm.name])
                error = stdev(means) if len(means) > 1 else 0.0
                lines = charts.setdefault(arm.curve, {})
                lines.setdefault(backbone, []).append(Spread(arm.x, fmean(means), error))
    return section("Mean test score", spreads(charts, y="mean score, %")) if charts else ""
