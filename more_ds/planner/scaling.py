"""How a step of a recipe grows from a few GPUs to a thousand, each with as many examples as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from more_ds import log
from more_ds.ds_config import BatchSizes
from more_ds.errors import UserError
from more_ds.planner.hardware import Gpu
from more_ds.planner.report import GB
from more_ds.planner.search import Candidate, Cluster, Subject, candidates, tokens_per_step

DOMINATES = 0.5
"""Share of a step above which communication that nothing hides decides how long it takes."""


def scaling(subject: Subject, gpu: Gpu, counts: Sequence[int], ds_paths: Sequence[str]) -> dict[str, list[Candidate]]:
    """A recipe on several numbers of GPUs, by DeepSpeed configuration; without those that do not fit anywhere.

    Nodes are those of the data sheet. Every GPU has the examples of a step that it has at the first count, in the
    largest micro-batches that fit it there, so that the global batch grows with the GPUs.

    Args:
        subject: the recipe.
        gpu: the kind.
        counts: numbers of GPUs, ascending.
        ds_paths: the configurations.

    Raises:
        UserError: the recipe's batch or the nodes do not divide, or nothing fits.
    """
    clusters = [_cluster(gpu, count) for count in counts]
    found: dict[str, list[Candidate]] = {}
    for first in candidates(subject, clusters[0], ds_paths):
        sizes = [_spread(first.sizes, count) for count in counts]
        own = [subject.candidate(c, first.ds_path, s) for c, s in zip(clusters, sizes, strict=True)]
        if any(one.fits for one in own):
            found[first.ds_path] = own
    if not found:
        raise UserError(f"no ds_config fits {clusters[-1]}; plan for {counts[-1]} alone to see what would")
    return found


def share(candidate: Candidate) -> float:
    """What part of a step is communication that nothing hides."""
    return candidate.time.exposed / candidate.time.seconds


def text(subject: Subject, gpu: Gpu, found: Mapping[str, Sequence[Candidate]]) -> str:
    """The tables, one for each DeepSpeed configuration, each with where communication begins to dominate."""
    parts = []
    for path, own in found.items():
        rows = []
        for one in own:
            rate = tokens_per_step(subject, one.sizes) / one.time.seconds
            world = one.sizes.world
            gb, full = one.memory.total / GB, own[0].time.seconds / one.time.seconds
            note = "" if one.fits else "does not fit"
            rows.append(
                [world, gb, f"{one.time.seconds:.3f}", int(rate), int(rate / world), 100 * full, 100 * share(one), note]
            )
        header = ["GPUs", "GPU GB", "s/step", "tokens/s", "a GPU", "of the first %", "communication %", ""]
        above = [one.sizes.world for one in own if share(one) > DOMINATES]
        end = f"communication takes more than {DOMINATES:.0%} of a step " + (
            f"from {above[0]} GPUs on" if above else f"nowhere up to {own[-1].sizes.world} GPUs"
        )
        sizes = own[0].sizes
        title = f"{Path(path).name}, {gpu.name}, {sizes.accumulation} x {sizes.micro} examples a GPU and step"
        parts.append(f"{title}\n{log.table(header, rows)}\n{end}")
    return "\n\n".join(parts)


def _cluster(gpu: Gpu, count: int) -> Cluster:
    nodes = -(-count // gpu.per_node)
    if count % nodes:
        raise UserError(f"--gpus {count} do not spread evenly over nodes of {gpu.per_node} {gpu.name}; take a multiple")
    return Cluster(gpu, count, nodes)


def _spread(first: BatchSizes, world: int) -> BatchSizes:
    return BatchSizes(first.micro * first.accumulation * world, first.micro, first.accumulation, world)
