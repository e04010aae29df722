"""The folder of a run: everything that is needed to read it, repeat it or go on with it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from more_ds.checkpoint_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    base_identity,
    is_complete,
    is_taken,
    newest_complete,
    write_file,
)
from more_ds.config import RunConfig
from more_ds.errors import UserError

NOT_DECISIVE = (
    "output_dir", "report_to", "save_total_limit", "logging_steps", "per_device_eval_batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_hours", "skip_nonfinite",
    "gradient_cosine",
)  # fmt: skip
"""Keys that a resumed run may change: they do not decide its result."""


class RunFolder:
    """Files of a run: `config.json`, `ds_config.json`, `plan.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`,
    `best/`, `last/`, `eval/`."""

    def __init__(self, path: Path) -> None:
        """Name a folder; nothing is written yet."""
        self.path = path
        self.checkpoints, self.best, self.last = path / "checkpoints", path / "best", path / "last"
        self.metrics = path / "metrics.jsonl"

    def check(self, config: RunConfig, resume: bool) -> None:
        """Refuse a folder that holds another run.

        Raises:
            UserError: it holds a run and none is to be resumed, or the run in it differs from `config`.
        """
        saved = self.path / "config.json"
        if not saved.is_file():
            if is_taken(self.path):
                raise UserError(f"output_dir {self.path} exists and holds something else; name another folder")
            return
        if not resume:
            raise UserError(f"output_dir {self.path} holds another run; name another folder, or add --resume auto")
        try:
            before, now = json.loads(saved.read_text(encoding="utf-8")), json.loads(json.dumps(asdict(config)))
        except ValueError as error:
            raise UserError(f"{saved} is not JSON: {error}; restore it, or name another folder") from error
        changed = [
            f"{key} was {before.get(key)!r}, is {now[key]!r}"
            for key in now
            if key not in NOT_DECISIVE and before.get(key) != now[key]
        ]
        if changed:
            raise UserError(f"the run in {self.path} is another one: {'; '.join(changed)}; name another folder")

    def find_checkpoint(self, which: str) -> Path | None:
        """The checkpoint to go on from: `none`, `auto` (the newest complete one, if there is any), or a folder.

        Raises:
            UserError: the folder named is no complete checkpoint.
        """
        if which == "none":
            return None
        if which == "auto":
            return newest_complete(self.checkpoints)
        if not is_complete(Path(which)):
            raise UserError(f"--resume {which} is no complete checkpoint; name a folder in checkpoints/, auto or none")
        return Path(which)

    def check_base(self, saved: dict[str, Any], config: RunConfig) -> None:
        """Refuse to go on from a checkpoint on another base model.

        Args:
            saved: what `base_identity` said when the checkpoint was written.
            config: the run.

        Raises:
            UserError: the weights differ.
        """
        now = base_identity(config.model, config.revision)
        if saved["sha256"] != now["sha256"]:
            raise UserError(f"the checkpoint in {self.path} was trained on another base model, {saved}, not on {now}")

    def create(self, config: RunConfig, ds_config: dict[str, Any], plan: dict[str, Any]) -> None:
        """Write what the run is made of: configuration, versions, and the numbers of `report.facts`."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "config.json", asdict(config))
        _write(self.path / "ds_config.json", ds_config)
        _write(self.path / "plan.json", plan)
        _write(self.path / "versions.json", versions() | {"command": sys.argv, "config_hash": config.digest()})

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def forget_after(self, step: int, is_evaluated: bool = True) -> None:
        """Drop the rows that a resumed run writes again.

        Args:
            step: that it goes on from; the rows of later ones go.
            is_evaluated: whether the evaluation at `step` is done with; else its rows go too.
        """
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _stays(line, step, is_evaluated)]
            write_file(self.metrics, "".join(line + "\n" for line in kept).encode())


def _stays(line: str, step: int, is_evaluated: bool) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # the process ended while it was written
        return False
    return bool(row["step"] < step or (row["step"] == step and (is_evaluated or "loss" in row)))


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's adapter into a folder."""
    for name in (ADAPTER, ADAPTER_CONFIG):
        shutil.copy2(checkpoint / name, folder / name)


def publish(checkpoint: Path, place: Path, write: Callable[[Path, Path], None] = copy_adapter) -> None:
    """Put what a checkpoint trained in `place`, in the stead of what is there; a whole one is always to be had.

    Args:
        checkpoint: its folder.
        place: where.
        write: writes from the checkpoint's folder into another one what is to be there.
    """
    fresh, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
    for left_over in (fresh, old):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir()
    write(checkpoint, fresh)
    if place.exists():
        os.replace(place, old)
    os.replace(fresh, place)
    shutil.rmtree(old, ignore_errors=True)


def default_path(recipe: str) -> Path:
    """A folder for a run that was not given one: `runs/<recipe>-<time>`."""
    return Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def versions() -> dict[str, Any]:
    """Versions of what computes, and the commit of the code, if it is a git checkout."""
    names = ("torch", "deepspeed", "transformers", "peft", "datasets", "bitsandbytes", "sentencepiece")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "commit": git.stdout.strip() or None,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2, default=str) + "\n").encode())
