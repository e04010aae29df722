"""The gates of a MoRE on the page: which rank each task uses in each map, how that moved, how sure the gates are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from more_ds.map_names import place_of
from more_ds.reporting.html import beside, flip, folded, heat, section, warning
from more_ds.reporting.record import Row, RunRecord
from more_ds.reporting.svg import Panel, panels

FRAMES = 5
"""Most evaluations whose whole table is on the page."""
DEFAULT_RANK = 8
"""The most ranks of an adapter whose configuration does not say how many."""

Table = Mapping[str, Sequence[float]]
"""A value for each task, by adapted map."""


def gate_section(record: RunRecord, group: int = 0) -> str:
    """Everything about the gates; empty for a method without them."""
    rows = record.with_key("gates")
    if not rows:
        return ""
    rank = int(record.config["adapter"].get("r", DEFAULT_RANK))
    frames = {
        f"step {row['step']:,}": table_by_module(row["gates"]["ranks"], record.tasks, 0.0, rank)
        for row in _spread(rows, FRAMES)
    }
    last = rows[-1]["gates"]
    certainty = {name: [value / math.log(rank) for value in values] for name, values in last["entropy"].items()}
    return "\n".join(
        [
            section(
                "Ranks by task, layer and module",
                *collapse(last["ranks"], record.tasks),
                flip(frames, group),
                note=f"The rank, of {rank}, that the gate of each map gives each task; choose a step to see it change.",
            ),
            section(
                "Gates over training",
                panels(gate_panels(rows, record.tasks, rank), columns=4, height=2.0),
                folded(
                    f"Entropy by task, layer and module at step {rows[-1]['step']:,}",
                    table_by_module(certainty, record.tasks, 0.0, 1.0, decimals=2),
                )
                if certainty
                else "",
                note="Entropy as a share of log r: 1 is undecided, 0 is sure. Moved: since the evaluation before.",
            ),
        ]
    )


def collapse(ranks: Table, tasks: Sequence[str]) -> list[str]:
    """A warning if in most maps all tasks use one rank; a gate then does nothing that a plain LoRA does not."""
    if len(tasks) < 2:
        return []
    same = sum(len(set(chosen)) == 1 for chosen in ranks.values())
    if 2 * same <= len(ranks):
        return []
    return [
        warning(
            f"The gates have collapsed: in {same} of {len(ranks)} maps all {len(tasks)} tasks use one rank. The tasks "
            "share one LoRA there; see whether the entropy below is near 0 or never left 1."
        )
    ]


def table_by_module(values: Table, tasks: Sequence[str], low: float, high: float, decimals: int = 0) -> str:
    """A heat map for each kind of map, with a row for each layer."""
    modules: dict[str, dict[str, Sequence[float]]] = {}
    for name, row in values.items():
        layer, module = place_of(name)
        stack = layer.rpartition("layer ")[0]
        modules.setdefault(f"{stack}{module}", {})[layer.removeprefix(stack)] = row
    return beside(
        *(
            heat(module, list(layers), tasks, list(layers.values()), low=low, high=high, decimals=decimals)
            for module, layers in modules.items()
        )
    )


def gate_panels(rows: Sequence[Row], tasks: Sequence[str], rank: int) -> list[Panel]:
    """Mean rank and mean entropy by task, the number of ranks in use, and how many choices have moved."""
    steps = [row["step"] for row in rows]
    gates = [row["gates"] for row in rows]
    charts = [Panel("mean rank", {task: (steps, [g["mean_rank"][task] for g in gates]) for task in tasks})]
    if "mean_entropy" in gates[-1]:
        share = {task: (steps, [g["mean_entropy"][task] / math.log(rank) for g in gates]) for task in tasks}
        charts.append(Panel("mean entropy / log r", share))
    charts.append(Panel("ranks in use, mean over maps", {"all tasks": (steps, [g["distinct_ranks"] for g in gates])}))
    if len(rows) > 1:
        charts.append(Panel("choices moved, %", {"all tasks": (steps[1:], moved(gates))}))
    return charts


def moved(gates: Sequence[Mapping[str, Any]]) -> list[float]:
    """The share of choices, in percent, that differ from those of the evaluation before."""
    tables = [np.array([gate["ranks"][name] for name in gates[0]["ranks"]]) for gate in gates]
    return [100.0 * float((b != a).mean()) for a, b in pairwise(tables)]


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` of the rows, the first and the last among them, evenly spread."""
    chosen = {round(i) for i in np.linspace(0, len(rows) - 1, min(count, len(rows)))}
    return [rows[i] for i in sorted(chosen)]
