"""What the planner found, as text and as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from more_ds import log
from more_ds.config import RunConfig
from more_ds.errors import UserError
from more_ds.planner.hardware import ASSUMPTIONS, training_rows
from more_ds.planner.memory import checkpoint_bytes
from more_ds.planner.search import Candidate, Cluster, Subject, tokens_per_step
from more_ds.planner.timing import OVERLAP

GB = 1e9


def job(subject: Subject, cluster: Cluster, chosen: Candidate, rows: int | None) -> dict[str, float]:
    """The whole run: steps, hours, tokens, energy, the checkpoint's bytes, and the share of the arithmetic used.

    Args:
        subject: the recipe.
        cluster: where it runs.
        chosen: how.
        rows: training rows of all tasks; None: those of the public data sets.

    Raises:
        UserError: the recipe counts epochs, and the rows of its tasks are not known.
    """
    config, seconds = subject.config, chosen.time.seconds
    steps = config.max_steps or math.ceil(config.num_train_epochs * _rows(subject, rows) / config.train_batch_size)
    tokens = tokens_per_step(subject, chosen.sizes)
    hours = steps * seconds / 3600
    return {
        "steps": steps,
        "seconds_per_step": seconds,
        "hours": hours,
        "gpu_hours": hours * cluster.gpus,
        "tokens": float(steps * tokens),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gpu": tokens / seconds / cluster.gpus,
        "utilisation": chosen.flops / seconds / (cluster.gpus * cluster.gpu.tflops * 1e12),
        "kwh": hours * cluster.gpus * cluster.gpu.watts / 1000,
        "checkpoint_bytes": checkpoint_bytes(subject.parameters, config.optim),
    }


def _rows(subject: Subject, rows: int | None) -> int:
    if rows is not None or subject.config.max_steps is not None:
        return rows or 0
    known = training_rows()
    missing = [task.name for task in subject.tasks if task.name not in known]
    if missing:
        raise UserError(f"the number of training rows of {', '.join(missing)} is not known; give --rows or --max_steps")
    return sum(known[task.name] for task in subject.tasks)


def text(
    recipe: str, subject: Subject, cluster: Cluster, found: Sequence[Candidate], chosen: Candidate,
    whole: Mapping[str, float],
) -> str:  # fmt: skip
    """The plan for a reader; arguments as for `as_json`."""
    config, parameters = subject.config, subject.parameters
    kinds = ", ".join(f"{name.removeprefix('more_')} {count:,}" for name, count in parameters.kinds.items())
    quantized = "" if config.quantization == "none" else f" in {config.quantization}"
    workload = subject.workload
    lines = [
        ("recipe", f"{recipe}: {config.method} on {config.model}{quantized}, {len(subject.tasks)} tasks"),
        ("frozen", f"{parameters.num_frozen:,} parameters, {subject.dtype}"),
        ("trained", f"{parameters.num_trainable:,} parameters ({kinds})"),
        ("rows", f"{workload.prompt} + {workload.answer} tokens, all full"),
        (
            "on",
            f"{cluster}; {cluster.gpu.memory:.0f} GB, {cluster.gpu.tflops:.0f} TFLOP/s each ({cluster.gpu.source})",
        ),
    ]
    head = "\n".join(f"{name:<10}{value}" for name, value in lines)
    return "\n\n".join([head, _choices(found, chosen), _split(chosen, cluster), _totals(chosen, whole)])


def brief(recipe: str, cluster: Cluster, chosen: Candidate, whole: Mapping[str, float]) -> str:
    """The plan as a row of a Markdown table: what, where, how, and what it takes."""
    sizes = chosen.sizes
    cells = [
        Path(recipe).stem, str(cluster), Path(chosen.ds_path).stem, f"{sizes.accumulation} x {sizes.micro}",
        f"{chosen.memory.total / GB:.0f} of {cluster.gpu.memory:.0f}", f"{whole['seconds_per_step']:.2f}",
        f"{whole['hours']:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def as_json(
    recipe: str, subject: Subject, cluster: Cluster, found: Sequence[Candidate], chosen: Candidate,
    whole: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """The plan as plain values.

    Args:
        recipe: its name.
        subject: the recipe's model.
        cluster: where it runs.
        found: the ways to run it that were compared.
        chosen: the recommended one.
        whole: from `job`.
    """
    parameters = subject.parameters
    return {
        "recipe": recipe,
        "model": subject.config.model,
        "gpu": asdict(cluster.gpu),
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "parameters": {
            "frozen": parameters.num_frozen,
            "trainable": parameters.num_trainable,
            "trainable_by_kind": parameters.kinds,
        },
        "candidates": [asdict(candidate) for candidate in found],
        "recommended": asdict(chosen),
        "job": dict(whole),
        "assumptions": ASSUMPTIONS,
    }  # fmt: skip


def arguments(recipe: str, chosen: Candidate, flags: Mapping[str, Any]) -> list[str]:
    """The flags of launch/train.py that make the plan, but for `--ds_config` and `--recipe`.

    Args:
        recipe: its name.
        chosen: the recommended way to run it.
        flags: what the planner was told about the run.
    """
    own = {
        "output_dir": f"runs/{Path(recipe).stem}",
        **flags,
        "per_device_train_batch_size": chosen.sizes.micro,
        "gradient_accumulation_steps": chosen.sizes.accumulation,
    }
    words: list[str] = []
    for name, value in own.items():
        pairs = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        for key, item in pairs.items():
            words += [f"--{key}", str(item)]
    return words


def command(recipe: str, cluster: Cluster, chosen: Candidate, flags: Mapping[str, Any]) -> str:
    """The command that starts the plan on one node, or on each of several."""
    nodes = f" --num_nodes {cluster.nodes} --hostfile HOSTFILE" if cluster.nodes > 1 else ""
    path = Path(chosen.ds_path)
    shown = f"ds_configs/{path.name}" if path.parent.name == "ds_configs" else str(path)
    rest = shlex.join(["--ds_config", shown, "--recipe", recipe, *arguments(recipe, chosen, flags)])
    return f"deepspeed{nodes} --num_gpus {cluster.per_node} launch/train.py {rest}"


def _choices(found: Sequence[Candidate], chosen: Candidate) -> str:
    rows = [
        [
            Path(c.ds_path).name, c.stage, c.sizes.micro, c.sizes.accumulation, c.memory.total / GB,
            max(c.memory.host.values(), default=0.0) / GB, c.time.seconds,
            "recommended" if c is chosen else "fits" if c.fits else "does not fit",
        ]
        for c in found
    ]  # fmt: skip
    return log.table(["ds_config", "ZeRO", "micro", "accumulation", "GPU GB", "host GB", "s/step", ""], rows)


def _split(chosen: Candidate, cluster: Cluster) -> str:
    rows: list[list[Any]] = [[name, value / GB] for name, value in chosen.memory.device.items() if value]
    rows += [["all", chosen.memory.total / GB], [f"of a {cluster.gpu.name}", cluster.gpu.memory]]
    rows += [[f"host: {name}", value / GB] for name, value in chosen.memory.host.items() if value]
    return log.table([f"memory with {Path(chosen.ds_path).name}", "GB"], rows)


def _totals(chosen: Candidate, whole: Mapping[str, float]) -> str:
    time = chosen.time
    sent = ", ".join(f"{name} {value / GB:.2f} GB" for name, value in time.received.items() if value) or "nothing"
    rows = [
        ("step", f"{time.seconds:.3f} s: compute {time.compute:.3f}, offload {time.offload:.3f}, "
                 f"communication that nothing hides {time.exposed:.3f}"),
        ("received", f"{sent} a step and GPU; gathers {time.gathers:.3f} s, {OVERLAP:.0%} of them hidden"),
        ("speed", f"{whole['tokens_per_second']:,.0f} tokens/s, {whole['tokens_per_second_per_gpu']:,.0f} a GPU; "
                  f"{whole['utilisation']:.0%} of the data sheet's arithmetic"),
        ("job", f"{whole['steps']:,.0f} steps, {whole['tokens']:.3g} tokens, {whole['hours']:.1f} h, "
                f"{whole['gpu_hours']:.0f} GPU hours, at most {whole['kwh']:.0f} kWh; evaluation comes on top"),
        ("checkpoint", f"{whole['checkpoint_bytes'] / 1e6:,.0f} MB: the adapter and Adam's moments, in float32"),
        ("assumed", ASSUMPTIONS),
    ]  # fmt: skip
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def refusal(recipe: str, config: RunConfig, cluster: Cluster, found: Sequence[Candidate], nearest: str) -> str:
    """The line that says that nothing fits, and what would."""
    least = min(found, key=lambda c: c.memory.total)
    return (
        f"recipe '{recipe}' ({config.model}) does not fit {cluster}: {Path(least.ds_path).name} with micro-batch "
        f"{least.sizes.micro} needs {least.memory.total / GB:.1f} GB of {cluster.gpu.memory:.1f}; "
        f"it fits with {nearest}"
    )
