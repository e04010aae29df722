"""What is no table of scores: transfer, experts switched off, time, and parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from more_ds import plan
from more_ds.compare.tables import Cell, Table
from more_ds.config import build
from more_ds.errors import UserError
from more_ds.methods import adapter_config, check_together
from more_ds.planner.hardware import model_config
from more_ds.reporting.record import read_run
from more_ds.results import RESULTS, read_results
from more_ds.study.definition import Arm, Study
from more_ds.study.jobs import Job, adapter_options, base_keys
from more_ds.tasks import resolve_tasks


def transfer_table(study: Study, jobs: Sequence[Job]) -> Table:
    """Mean and deviation over the draws, by system, task and number of shots."""
    rows = []
    for job in jobs:
        if job.source is None:
            continue
        found = json.loads((job.results / RESULTS).read_text(encoding="utf-8"))
        metric = found["metric"]
        start = [Cell(f"{job.backbone}, {job.arm}"), Cell(f"{found['task']}: {metric}")]
        rows.append([*start, Cell("majority answer"), Cell(found["majority"][metric]), Cell("")])
        for part in found["summary"]:
            shots = f"{part['shots']} shots"
            rows.append([*start, Cell(shots), Cell(part["mean"], part["deviation"]), Cell(str(part["draws"]))])
    title = f"{study.name}: {study.about} (± deviation over draws of shots)"
    return Table(title, ["system", "task", "from", "score", "draws"], rows, 3, {})


def scaling_table(study: Study, jobs: Sequence[Job]) -> Table:
    """The mean validation score with each expert switched off."""
    rows, whole = [], 0.0
    for job in jobs:
        if job.component is None:
            continue
        score = fmean(result.score for result in read_results(job.results)[1])
        whole = score if job.component == 0 else whole
        name = "all experts" if job.component == 0 else f"without expert {job.component}"
        rows.append([Cell(job.backbone), Cell(name), Cell(score), Cell(score - whole)])
    title = f"{study.name}: mean validation score with one expert of the trained adapter switched off"
    return Table(title, ["backbone", "adapter", "score", "change"], rows, 2, {})


def speed_table(study: Study, jobs: Sequence[Job]) -> Table:
    """Median seconds of a step, the first fifth left out, and how many times the baseline's that is."""
    seconds: dict[tuple[str, str], float] = {}
    for job in jobs:
        record = read_run(job.folder, job.id)
        rates = [row["examples_per_second"] for row in record.with_key("loss")]
        seconds[job.backbone, job.arm] = record.config["train_batch_size"] / median(rates[len(rates) // 5 :])
    rows = []
    for (backbone, arm), own in seconds.items():
        ratio = own / seconds[backbone, str(study.baseline)]
        rows.append([Cell(backbone), Cell(arm), Cell(own, decimals=4), Cell(ratio), Cell(study.relative.get(arm))])
    title = f"{study.name}: {study.about}"
    return Table(title, ["backbone", "system", "seconds a step", "relative", "relative (published)"], rows, 2, {})


def count_table(study: Study, scale: Mapping[str, Any], flags: Mapping[str, Any]) -> Table:
    """Trainable parameters of each system, from shapes alone; None where a method does not go with a backbone."""
    rows = []
    for backbone, keys in scale[study.data].items():
        common = base_keys(keys, flags)
        counts = {arm.name: _count(study, arm, common) for arm in study.arms}
        base = counts.get(str(study.baseline))
        for name, (count, tasks) in counts.items():
            share = count / base[0] if count and base and base[0] else None
            per_task = count / tasks / 1e6 if count else None
            shown = f"{count:,}" if count else None
            rows.append([Cell(backbone), Cell(name), Cell(shown), Cell(per_task, decimals=3), Cell(share)])
    title = f"{study.name}: {study.about}"
    header = ["backbone", "system", "trainable", "10^6 a task", f"times {study.baseline}"]
    return Table(title, header, rows, 2, {})


def _count(study: Study, arm: Arm, common: Mapping[str, Any]) -> tuple[int | None, int]:
    """Trainable parameters, and the number of tasks."""
    values = {**common, **arm.run, "method": arm.method, "adapter": adapter_options(arm, common["adapter"])}
    config = plan.with_demo(build(values, f"study '{study.name}', system '{arm.name}'"))
    shape = model_config(config.model, config.revision)
    names = [task.name for task in resolve_tasks(config.tasks or None, config.suite, config.tasks_file)]
    try:
        check_together(config.method, encoder_decoder=shape.is_encoder_decoder)
        adapter = adapter_config(config.method, config.adapter, names, shape)
        return sum(plan.count(shape, adapter, False).trainable.values()), len(names)
    except UserError:
        return None, len(names)
