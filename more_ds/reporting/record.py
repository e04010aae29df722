"""What a run's folder says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from more_ds.errors import UserError
from more_ds.results import RESULTS, TaskResult, read_results

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run that has been read.

    Attributes:
        name: what it is called on the page.
        path: its folder.
        config: its configuration, resolved.
        plan: `more_ds.report.facts`.
        versions: of what computed, and the command.
        rows: of `metrics.jsonl`, in the order of steps.
        results: of the test splits, without their records; empty where they have not been scored.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    versions: Mapping[str, Any]
    rows: list[Row]
    results: list[TaskResult]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the order of their ids."""
        return list(self.plan["tasks"])

    def with_key(self, key: str) -> list[Row]:
        """The rows that hold `key`: `loss` (training), `evaluation`, `gates` or `gradients`."""
        return [row for row in self.rows if key in row]

    @cached_property
    def last_step(self) -> int:
        """Optimizer steps taken when the last row was written."""
        return int(self.rows[-1]["step"])

    @property
    def adapter(self) -> Path | None:
        """The folder of its best adapter, or of the last; None: nothing has been saved."""
        return next((self.path / slot for slot in ("best", "last") if (self.path / slot).is_dir()), None)


def read_run(path: Path, name: str) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: it holds no run, a run without metrics, or one of another version.
    """
    config = _json(path, "config.json")
    if config is None or "method" not in config:
        raise UserError(f"{path} is no run: no config.json of one; name a folder that launch/train.py has written")
    plan, versions = _json(path, "plan.json"), _json(path, "versions.json")
    if plan is None or versions is None or "tasks" not in plan:
        raise UserError(f"the run {path} is of another version: no plan.json that can be read; train it again")
    scored = path / "eval" / "test"
    results = read_results(scored)[1] if (scored / RESULTS).is_file() else []
    return RunRecord(name, path, config, plan, versions, _rows(path / "metrics.jsonl"), results)


def _rows(path: Path) -> list[Row]:
    """The rows of a log; a last line that is cut, by a kill, does not count."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = text.splitlines()
    whole = lines if text.endswith("\n") else lines[:-1]
    if not whole:
        raise UserError(f"the run {path.parent} has no metrics yet: {path.name} is missing or empty; train it first")
    try:
        rows = [json.loads(line) for line in whole]
        rows.sort(key=lambda row: row["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is of another format ({type(error).__name__}: {error}); only what launch/train.py writes is read"
        ) from error
    return rows


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; it is damaged, or of something else than a run") from error
    return content if isinstance(content, dict) else None
