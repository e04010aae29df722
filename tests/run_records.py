"""A run's folder written by hand: three tasks, eight steps, two evaluations, and names that attack the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from test_results import result

from more_ds.results import write_results

HOSTILE = "<script>alert(1)</script>$x$&"
TASKS = ["one", "two", HOSTILE]
MAPS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
CONFIG = {"model": "base", "method": "more", "suite": ["toy"], "adapter": {"r": 4}, "train_batch_size": 4, "seed": 1}


def write_run(folder: Path, *, ranks: list[list[int]] | None = None, scored: bool = True, **plan: Any) -> Path:
    """A run of three tasks and eight steps, with two evaluations; `ranks` are those of the second, by map."""
    folder.mkdir(parents=True)
    tasks = {
        name: {"suite": "toy", "metric": "accuracy", "rows": 10, "validation": 5, "share": 1 / 3} for name in TASKS
    }
    facts = {"tasks": tasks, "trainable": {"A": 30, "B": 10}, "frozen": 960, "total_steps": 8, "steps_per_epoch": 8,
             "dtype": "fp32", "ranks": 1, "micro_batch": 4, "accumulation": 1, "device": "CPU",
             "device_memory_gb": None}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG | {"learning_rate": 0.1}))
    (folder / "plan.json").write_text(json.dumps(facts | plan))
    (folder / "versions.json").write_text(json.dumps({"commit": "abc", "command": ["train", HOSTILE]}))
    rows: list[dict[str, Any]] = []
    for step in range(1, 9):
        task = TASKS[step % 3]
        part = {"loss": 1 / step, "loss_auxiliary": 0.1, "examples": 4, "tokens": 40, "label_tokens": 8}
        rows.append({"step": step, "learning_rate": 0.1, "grad_norm": 2.0, "loss": 1.0, "loss_lm": 1 / step,
                     "loss_auxiliary": 0.1, "tasks": {task: part}, "tokens_per_second": 100.0 * step,
                     "examples_per_second": 2.0, "padding": 0.25, "peak_memory_gb": 1.5})  # fmt: skip
    for step, chosen in ((0, [[1, 2, 3]] * 3), (8, ranks or [[1, 2, 3], [1, 4, 3], [4, 4, 4]])):
        rows.append({"step": step, "mean_score": 50.0, "evaluation": {name: {"accuracy": 50.0} for name in TASKS}})
        rows.append({"step": step, "gates": {
            "ranks": dict(zip(MAPS, chosen, strict=True)), "entropy": {name: [math.log(4), 0.0, 0.5] for name in MAPS},
            "mean_rank": dict.fromkeys(TASKS, 2.0), "mean_entropy": dict.fromkeys(TASKS, 1.0), "distinct_ranks": 2.0,
        }})  # fmt: skip
        cosine = {"one": {"two": -0.25, HOSTILE: 0.5}, "two": {HOSTILE: None}}
        rows.append({"step": step, "gradients": {"norm": dict.fromkeys(TASKS, 3.0), "cosine": cosine}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if scored:
        write_results(folder / "eval" / "test", [result(name, 60.0 + i) for i, name in enumerate(TASKS)], {})
    draw = np.random.default_rng(0)
    tables = {f"base_model.model.{name}.more_task.weight": draw.normal(size=(3, 6)) for name in MAPS}
    (folder / "best").mkdir()
    save_file(tables | {"base_model.model.x.more_A.weight": np.ones((1, 1))}, folder / "best/adapter_model.safetensors")
    return folder
