"""The tables a run shows: what will run, how the tasks fare, which ranks they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from more_ds import log
from more_ds.data.encoding import Encoder
from more_ds.engine import Ranks
from more_ds.map_names import place_of
from more_ds.plan import Plan
from more_ds.tuners import MoreConfig


def header(plan: Plan, ranks: Ranks, output: str) -> str:
    """What will run, in a few lines."""
    config, sizes = plan.config, plan.sizes
    where = (
        f"{ranks.world} rank{'s' * (ranks.world > 1)} on {torch.cuda.get_device_name()}"
        if ranks.on_gpu
        else f"{ranks.world} rank{'s' * (ranks.world > 1)} on the CPU, {torch.get_num_threads()} thread"
        f"{'s' * (torch.get_num_threads() > 1)} each"
    )
    kinds = ", ".join(f"{name.removeprefix('more_')} {count:,}" for name, count in plan.trainable.items())
    trainable = sum(plan.trainable.values())
    maps = ", ".join(f"{count} {name}" for name, count in plan.maps.items())
    untouched = [("frozen", f"{plan.untouched}: no adapter of this run is in them")] if plan.untouched else []
    quantized = "" if config.quantization == "none" else f", the base in {config.quantization}"
    lines = [
        ("method", f"{config.method}, {trainable:,} trainable ({kinds}), {plan.frozen:,} frozen"),
        ("maps", maps),
        *untouched,
        *_scale(plan),
        ("model", f"{config.model} ({plan.model_config.model_type}, {plan.dtype}{quantized})"),
        ("ranks", f"{where}, ZeRO-{plan.stage}"),
        (
            "batch",
            f"{sizes.total} examples a step = {sizes.world} ranks x {sizes.micro} x {sizes.accumulation} "
            f"accumulated; the loss is the mean over all label tokens of the step",
        ),
        (
            "steps",
            f"{plan.total_steps:,} ({plan.epochs:.2f} epochs), evaluation every {plan.eval_steps:,}; {config.optim}",
        ),
        ("output", output),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in lines)


def _scale(plan: Plan) -> list[tuple[str, str]]:
    """What c = r_t / T does to the update, where the number of tasks makes it another one than the rank suggests."""
    adapter, count = plan.adapter, len(plan.tasks)
    if not isinstance(adapter, MoreConfig) or adapter.scale != "rank" or 0.5 <= adapter.r / count <= 1.5:
        return []
    factor = f"c = r_t / T multiplies the update by {adapter.r / count:.2f} at full rank (r = {adapter.r}, T = {count})"
    return [("scale", f"{factor}, as that much more lora_alpha would; --adapter.scale none leaves it out")]


def facts(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """What a run is, in numbers that are not in its configuration: `plan.json`."""
    sizes = plan.sizes
    return {
        "tasks": {
            row.name: {
                "suite": task.suite,
                "metric": task.primary,
                "rows": row.size,
                "validation": len(plan.validation[row.name]),
                "share": row.share,
            }
            for task, row in zip(plan.tasks, plan.sampler.summary(plan.total_steps), strict=True)
        },
        "trainable": plan.trainable,
        "frozen": plan.frozen,
        "maps": plan.maps,
        "total_steps": plan.total_steps,
        "steps_per_epoch": plan.sampler.steps_per_epoch,
        "dtype": plan.dtype,
        "ranks": sizes.world,
        "micro_batch": sizes.micro,
        "accumulation": sizes.accumulation,
        "device": torch.cuda.get_device_name() if ranks.on_gpu else "CPU",
        "device_memory_gb": torch.cuda.get_device_properties(ranks.device).total_memory / 1e9 if ranks.on_gpu else None,
    }


def sampling(plan: Plan) -> str:
    """The tasks' sizes, sampling probabilities, samples and repeats."""
    return log.table(
        ["task", "train rows", "validation", "share %", "samples", "passes"],
        [
            [row.name, row.size, len(plan.validation[row.name]), row.share * 100, int(row.samples), float(row.passes)]
            for row in plan.sampler.summary(plan.total_steps)
        ],
    )


def scores(
    names: Sequence[str],
    metric: Mapping[str, str],
    columns: Mapping[str, Mapping[str, float]],
) -> str:
    """A row per task, a column per system; the mean below.

    Args:
        names: rows; `<task>/<split>` for further test splits.
        metric: primary metric by row.
        columns: title -> score in percent by row; a missing one is a dash.
    """
    rows: list[list[Any]] = [[name, metric[name], *(col.get(name) for col in columns.values())] for name in names]
    main = [name for name in names if "/" not in name]
    means = [
        sum(col[name] for name in main) / len(main) if all(name in col for name in main) else None
        for col in columns.values()
    ]
    return log.table(["task", "metric", *columns], [*rows, ["mean", "", *means]])


def rank_table(ranks: Mapping[str, Tensor], task_names: Sequence[str], before: Mapping[str, Tensor] | None) -> str:
    """The ranks that the gates have chosen: mean over a layer's maps, by task; and how many choices have moved.

    Args:
        ranks: (tasks,) by adapted map, from `MoreModel.ranks`.
        task_names: columns.
        before: the same at the start of the run, or None.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, chosen in ranks.items():
        layers.setdefault(place_of(name).layer, []).append(chosen)
    rows = [[name, *torch.stack(chosen).float().mean(0).tolist()] for name, chosen in layers.items()]
    every = torch.stack(list(ranks.values())).float()
    text = log.table(["mean rank", *task_names], [*rows, ["all", *every.mean(0).tolist()]])
    if before is not None:
        moved = sum(int((ranks[name] != before[name]).sum()) for name in ranks)
        text += f"\n{moved} of {every.numel()} choices have moved since the start"
    return text


def cut_prompts(encoder: Encoder) -> str:
    """The share of the prompts so far that were too long."""
    share = 100 * encoder.num_cut / encoder.num_prompts
    return f"{share:.1f} % of the prompts were longer than max_source_length={encoder.max_source_length}; cut"
