"""The page of one run or of several: what stands on it, and in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from more_ds.compare.comparison import Row as ScoredRow
from more_ds.compare.comparison import System, comparison_tables
from more_ds.compare.tables import as_html
from more_ds.errors import UserError
from more_ds.reporting import curves
from more_ds.reporting.embeddings import embedding_section
from more_ds.reporting.gates import gate_section
from more_ds.reporting.html import beside, escape, folded, heat, page, pairs, paragraph, section, table
from more_ds.reporting.predicted import measured, predicted
from more_ds.reporting.record import RunRecord
from more_ds.reporting.svg import bars

_ABOUT = ("method", "model", "suite", "train_batch_size", "learning_rate", "sampling", "sampling_scope", "seed")


def run_page(record: RunRecord) -> str:
    """The page of one run."""
    return page(f"Run {record.name}", _run(record))


def runs_page(records: Sequence[RunRecord]) -> str:
    """The page of several runs: curves over each other, scores side by side, then each for itself."""
    parts = [
        section("Runs", _runs_table(records)),
        section("Scores", *_side_by_side(records)),
        section("Validation", curves.scores_by_task(records), note="Primary metric in percent."),
        section("Training", curves.training(records)),
        section("Loss by task", curves.losses_by_task(records), note="In nats per label token."),
        section("Gates", curves.gates_overlaid(records)),
        section("Speed and memory", curves.speed(records)),
        *(folded(f"All of {record.name}", *_run(record, i)) for i, record in enumerate(records)),
    ]
    return page(f"{len(records)} runs", parts)


def _run(record: RunRecord, group: int = 0) -> list[str]:
    return [
        section("Configuration", *_configuration(record)),
        section("Scores", *_scores(record)),
        section("Training", curves.training([record])),
        section("Validation", curves.scores_by_task([record]), note="Primary metric in percent, at each evaluation."),
        section("Loss by task", curves.losses_by_task([record]), note="In nats per label token."),
        gate_section(record, group),
        embedding_section(record.adapter, record.tasks),
        section(
            "Tasks", _ledger(record), note="What each task has had so far. A pass is all of its training rows once."
        ),
        _gradients(record),
        section("Speed and memory", *_speed(record)),
    ]


def _configuration(record: RunRecord) -> list[str]:
    plan, config = record.plan, record.config
    trainable = sum(plan["trainable"].values())
    about: dict[str, Any] = {key.replace("_", " "): _text(config[key]) for key in _ABOUT if config.get(key)}
    about |= {
        "trainable": trainable,
        "frozen": plan["frozen"],
        "share trained": f"{100 * trainable / (trainable + plan['frozen']):.3f} %",
        "steps": f"{record.last_step:,} of {plan['total_steps']:,}",
        "epochs": round(record.last_step / plan["steps_per_epoch"], 2),
        "device": f"{plan['ranks']} x {plan['device']}, {plan['dtype']}",
        "commit": record.versions.get("commit"),
        "options of the method": _text(config["adapter"]) or "none",
    }
    whole = json.dumps({"configuration": config, "versions": record.versions}, indent=2)
    return [pairs(about), folded("All of it", f"<pre>{escape(whole)}</pre>")]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _scores(record: RunRecord) -> list[str]:
    results = record.results
    if not results:
        return [paragraph("The test splits have not been scored yet; validation scores are below.")]
    names = [r.task if r.split == "test" else f"{r.task} ({r.split})" for r in results]
    errors = [(r.score, r.standard_errors.get(r.primary, 0.0)) for r in results]
    rows = [
        [name, r.primary, r.score, r.standard_errors.get(r.primary), (r.majority or {}).get(r.primary), r.n]
        for name, r in zip(names, results, strict=True)
    ]
    test = [r.score for r in results if r.split == "test"]
    if len(test) > 1:
        rows.append([f"mean of {len(test)}", "", sum(test) / len(test), None, None, None])
    series: dict[str, list[tuple[float, float] | None]] = {"test": [*errors]}
    if all(r.majority for r in results):
        series["majority answer"] = [(r.majority[r.primary], 0.0) if r.majority else None for r in results]
    return [
        bars(names, series, "primary metric, %"),
        table(["task", "metric", "score", "± s.e.", "majority", "examples"], rows, labels=2),
    ]


def _ledger(record: RunRecord) -> str:
    sums = {task: {"examples": 0, "tokens": 0, "label_tokens": 0} for task in record.tasks}
    for row in record.with_key("loss"):
        for task, part in row["tasks"].items():
            for key in sums[task]:
                sums[task][key] += part[key]
    whole = sum(own["examples"] for own in sums.values()) or 1
    rows = []
    for task, own in sums.items():
        about = record.plan["tasks"][task]
        passes = own["examples"] / about["rows"]
        rows.append([task, about["rows"], own["examples"], 100.0 * own["examples"] / whole, passes, own["tokens"],
                     own["label_tokens"]])  # fmt: skip
    return table(["task", "training rows", "samples", "share, %", "passes", "tokens", "label tokens"], rows)


def _gradients(record: RunRecord) -> str:
    rows = record.with_key("gradients")
    if not rows:
        return ""
    last, tasks = rows[-1], record.tasks
    values = [[curves.cosine(last["gradients"]["cosine"], one, other) for other in tasks] for one in tasks]
    return section(
        "Gradients of the tasks",
        beside(heat(f"cosine at step {last['step']:,}", tasks, tasks, values, low=0.0, high=1.0, decimals=2)),
        curves.gradient_norms(record),
        note="Of one micro-batch for each task and rank. Below zero, a step for one task is a step back for the other.",
    )


def _speed(record: RunRecord) -> list[str]:
    found = measured(record)
    if not found:
        return []
    try:
        planned, note = predicted(record), ""
    except (UserError, OSError) as error:
        planned, note = {}, f"Not predicted: {error}."
    rows = [[name, value, planned.get(name)] for name, value in found.items()]
    return [table(["", "measured", "predicted"], rows), paragraph(note) if note else "", curves.speed([record])]


def _runs_table(records: Sequence[RunRecord]) -> str:
    rows = [
        [r.name, r.config["method"], _text(r.config["adapter"]), r.config["seed"], r.last_step,
         sum(r.plan["trainable"].values()), r.config["learning_rate"]] for r in records
    ]  # fmt: skip
    return table(["run", "method", "options", "seed", "steps", "trainable", "learning rate"], rows, labels=3)


def _side_by_side(records: Sequence[RunRecord]) -> list[str]:
    systems = [
        System(r.name, {ScoredRow(x.suite, x.task, x.split): x for x in r.results}, {}, r.path)
        for r in records
        if r.results
    ]
    if not systems:
        return [paragraph("None of the runs has scored its test splits.")]
    names = list(dict.fromkeys(row for system in systems for row in system.results))
    series = {
        s.name: [(s.results[n].score, s.results[n].standard_errors.get(s.results[n].primary, 0.0))
                 if n in s.results else None for n in names] for s in systems
    }  # fmt: skip
    tables = [f'<div class="wide">{as_html(one, 2)}</div>' for one in comparison_tables(systems)]
    return [bars([n.label("test") for n in names], series, "primary metric, %"), *tables]
