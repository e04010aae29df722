"""What all ranks must have alike: compared once, before a weight is read.

Ranks that read other data, or that resume from other checkpoints, do not fail: they train wrongly or wait for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from more_ds.data.stored import digest_examples
from more_ds.digest import digest
from more_ds.engine import Ranks
from more_ds.errors import UserError
from more_ds.plan import Plan
from more_ds.run_folder import versions


def fingerprint(plan: Plan, resumed: Path | None) -> dict[str, str]:
    """What a rank is about to do, by what it is made of: a short text each, the same on all ranks of a run.

    Args:
        plan: the run.
        resumed: the checkpoint that this rank has found to go on from.
    """
    splits = (("validation", plan.validation), *plan.test.items())
    return {
        "configuration": plan.config.digest(),
        "DeepSpeed configuration": digest(plan.ds_config),
        "training data": digest([digest_examples(examples) for examples in plan.train]),
        "scored data": digest(
            [[name, task, digest_examples(own)] for name, split in splits for task, own in split.items()]
        ),
        "sampling plan": json.dumps(plan.sampler.state_dict()["plan"], sort_keys=True),
        "checkpoint": resumed.name if resumed else "none",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def check_ranks(ranks: Ranks, mine: Mapping[str, str]) -> None:
    """Refuse ranks that differ. Collective.

    Args:
        ranks: those of the run.
        mine: this rank's `fingerprint`, or anything else that must be alike.

    Raises:
        UserError: on every rank: what differs, and on which rank from rank 0.
    """
    everyone = ranks.everyone(dict(mine))
    for name in mine:
        for rank, other in enumerate(everyone):
            first, there = everyone[0][name], other[name]
            if there != first:
                raise UserError(
                    f"the ranks differ in their {name}: {_shown(first, there)} on rank 0, {_shown(there, first)} on "
                    f"rank {rank}; give all nodes the same files, flags and environment"
                )


def _shown(text: str, other: str) -> str:
    """The parts of a list in which it differs from another."""
    parts = [part for part in text.split(", ") if part not in other.split(", ")]
    return ", ".join(parts)[:200] or text[:200]
