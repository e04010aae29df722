"""A trained MoLE with some of its LoRAs masked out: the others' weights are renormalised, nothing is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG, to_json, write_file
from more_ds.errors import UserError, suggest
from more_ds.loading import Subject
from more_ds.tuners.mole import MoleConfig


def masked(subject: Subject, names: Sequence[str], to: Path) -> list[str]:
    """Write the adapter of a MoLE that uses some of its LoRAs; returns their names.

    Args:
        subject: a run or an adapter folder.
        names: of LoRAs, as they were given when it was trained, or their numbers from 0.
        to: a folder that exists.

    Raises:
        UserError: it is no MoLE, or has no such LoRA.
    """
    config = subject.adapter_config
    if not isinstance(config, MoleConfig) or subject.adapter is None:
        raise UserError(f"{subject.name} holds no MoLE, whose LoRAs could be masked; train one with --method mole")
    known = {name: i for i, name in enumerate(config.loras)} | {str(i): i for i in range(len(config.loras))}
    for name in names:
        if name not in known:
            raise UserError(f"the MoLE has no LoRA '{name}'{suggest(name, config.loras)}")
    only = sorted({known[name] for name in names})
    content = json.loads((subject.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    shutil.copyfile(subject.adapter / ADAPTER, to / ADAPTER)
    write_file(to / ADAPTER_CONFIG, to_json({**content, "only": only}))
    return [config.loras[i] for i in only]
