"""Numbers that others have published, to stand beside ours (`paper.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

GROUPS = ("results", "ablation")
FILE = Path(__file__).with_name("paper.yaml")


@dataclass(frozen=True)
class Published:
    """One column of published numbers.

    Attributes:
        tasks: the tasks of which `mean` is the mean.
        scores: primary metric by task, in percent.
    """

    system: str
    source: str
    suite: str
    split: str
    tasks: Sequence[str]
    mean: float
    scores: Mapping[str, float] = field(default_factory=dict)


def load_published(group: str) -> list[Published]:
    """Read the published numbers of one of `GROUPS`."""
    suites = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return [
        Published(**entry, suite=suite, split=known["split"], tasks=known["tasks"])
        for suite, known in suites.items()
        for entry in known[group]
    ]
