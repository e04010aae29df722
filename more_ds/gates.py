"""What the gates of a MoRE choose, and how sure they are, while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.tuners.more.experts import task_probabilities
from more_ds.tuners.more.gated import GatedMap

ADAPTER = "default"
"""The name under which PEFT keeps the adapter of a run."""


@torch.no_grad()
def gate_entropy(model: nn.Module) -> dict[str, Tensor]:
    """Entropy of every task's distribution over the ranks, by adapted map.

    Args:
        model: with a MoRE adapter or without; its adapter's parameters are whole on this rank.

    Returns:
        (tasks,) float32 in nats, from 0 (sure) to log r (undecided); empty where no gate reads task embeddings.
    """
    found = {}
    for layer in model.modules():
        if not isinstance(layer, GatedMap) or ADAPTER not in layer.more_gate:
            continue
        config = layer.configs[ADAPTER]
        if config.gate_input == "task":
            # Not called as modules: outside of a forward pass, ZeRO-3's hooks would lose their place.
            embeddings = layer.more_task[ADAPTER].forward()
            p = task_probabilities(layer.more_gate[ADAPTER].forward, embeddings, config.table_sizes)
            found[layer.key] = torch.special.entr(p.float()).sum(-1).cpu()
    return found


def gate_row(ranks: Mapping[str, Tensor], entropy: Mapping[str, Tensor], task_names: Sequence[str]) -> dict[str, Any]:
    """The gates as a part of a row of `metrics.jsonl`.

    Args:
        ranks: (tasks,) from 1, by adapted map.
        entropy: from `gate_entropy`.
        task_names: in the order of their ids.

    Returns:
        `ranks` and `entropy` by map, in the order of tasks; and what fits a curve: `mean_rank` and `mean_entropy` by
        task, and `distinct_ranks`, the number of ranks in use, a mean over the maps.
    """
    every = torch.stack(list(ranks.values())).float()
    row: dict[str, Any] = {
        "ranks": {name: chosen.tolist() for name, chosen in ranks.items()},
        "entropy": {name: [round(value, 4) for value in values.tolist()] for name, values in entropy.items()},
        "mean_rank": _by_task(every, task_names),
        "distinct_ranks": sum(len(chosen.unique()) for chosen in ranks.values()) / len(ranks),
    }
    if entropy:
        row["mean_entropy"] = _by_task(torch.stack(list(entropy.values())), task_names)
    return row


def _by_task(values: Tensor, task_names: Sequence[str]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in zip(task_names, values.mean(0).tolist(), strict=True)}
