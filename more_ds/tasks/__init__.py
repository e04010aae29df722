"""Tasks as data: the suites that come with the package, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from more_ds.errors import UserError, suggest
from more_ds.metrics import require
from more_ds.tasks.schema import Task
from more_ds.tasks.suite import load_suite

__all__ = ["Task", "available", "load_suite", "resolve_tasks", "suite_path"]

_PACKAGE = Path(__file__).resolve().parents[1]


def suite_path(name: str) -> Path:
    """Return the YAML file of a suite that comes with the package.

    Raises:
        UserError: there is no such suite.
    """
    files = _suite_files()
    if name not in files:
        raise UserError(f"unknown suite '{name}'{suggest(name, files)}")
    return files[name]


def available() -> dict[str, list[Task]]:
    """Return the tasks of every suite that comes with the package, by the suite's name."""
    return {name: load_suite(path) for name, path in _suite_files().items()}


def resolve_tasks(
    names: Sequence[str] | None = None,
    suites: Sequence[str] = (),
    tasks_file: str | Path | None = None,
) -> list[Task]:
    """Return the chosen tasks.

    A name may be in several suites (`boolq`); `suite/name` then says which is meant. One run holds a name once, because
    data, scores and the adapter know a task by it.

    Args:
        names: tasks to choose, `name` or `suite/name`, in the order wanted; None: all of the suites and the tasks file.
        suites: packaged suites to choose from; empty: every suite when `names` is given, else none.
        tasks_file: the user's own YAML file, whose tasks are added.

    Raises:
        UserError: an unknown or repeated name, a name with two meanings, nothing chosen, or a metric that needs
            something which is not installed.
    """
    chosen = list(suites) or (list(_suite_files()) if names else [])
    pool = [task for suite in dict.fromkeys(chosen) for task in load_suite(suite_path(suite))]
    if tasks_file is not None:
        pool += load_suite(tasks_file)
    wanted = list(names) if names is not None else [task.name for task in pool]
    if not wanted:
        raise UserError("no task chosen; name tasks, a suite or a tasks file")
    if names is not None and len({name.rpartition("/")[2] for name in wanted}) < len(wanted):
        raise UserError(f"a task is named twice: {', '.join(wanted)}; name each once")
    tasks = [_only(name, pool) for name in wanted]
    require(metric for task in tasks for metric in task.metrics)
    return tasks


def _only(name: str, pool: Sequence[Task]) -> Task:
    suite, _, bare = name.rpartition("/")
    found = [task for task in pool if task.name == bare and suite in ("", task.suite)]
    if not found:
        known = (f"{task.suite}/{task.name}" if suite else task.name for task in pool)
        raise UserError(f"unknown task '{name}'{suggest(name, known)}")
    if len(found) > 1:
        where = ", ".join(f"'{task.suite}'" for task in found)
        choices = " or ".join(f"{task.suite}/{task.name}" for task in found)
        raise UserError(f"task '{name}' is in {where}; choose {choices}, or rename the task")
    return found[0]


def _suite_files() -> dict[str, Path]:
    return {path.stem: path for folder in ("demo", "tasks")
            for path in sorted((_PACKAGE / folder).glob("*.yaml"))}  # fmt: skip
