"""Where the rows of a task come from: its own files, a folder of data, or the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from more_ds.data.row_files import Row, count_rows, listing, read_rows, readable
from more_ds.digest import digest_files
from more_ds.errors import UserError
from more_ds.tasks.schema import Task
from more_ds.tasks.suite import SUFFIXES, is_file_name

_HUB_ROWS = 4096


class Split(Protocol):
    """The rows of one split of a source, which need not fit in memory."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows in their order, from the first at every call."""

    def count(self) -> int:
        """Return their number."""

    def identity(self) -> str:
        """Return a text that is another one for other rows."""


def find_source(task: Task, data_dir: str | Path | None) -> tuple[Mapping[str, Split], str]:
    """Return the splits that a task's data come in, and words for where they are.

    Raises:
        UserError: there is no folder, no file, or nothing that names the data.
    """
    if task.files:
        files, where = dict(task.files), "files of the tasks file"
    elif data_dir is not None:
        folder = Path(data_dir) / task.path
        files, where = _folder(task, folder), f"in {folder}"
    elif task.hub is not None:
        return {name: HubSplit(task, name) for name in task.hub.splits}, f"of {task.hub.id}"
    else:
        raise UserError(
            f"task '{task.name}' names no hub data set and no files; give --data_dir with {task.path}/train.jsonl in it"
        )
    return {name: FileSplit(path) for name, path in files.items()}, where


@dataclass(frozen=True)
class FileSplit:
    """A split that is a file."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """Yield the rows; see `read_rows`."""
        return read_rows(self.path)

    def count(self) -> int:
        """Return their number; see `count_rows`."""
        return count_rows(self.path)

    def identity(self) -> str:
        """Return the SHA-256 of the file: its place and its times say less of what it holds."""
        with readable(self.path):
            return digest_files([self.path])


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set of the Hugging Face hub."""

    task: Task
    name: str

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the library's memory-mapped table."""
        for start in range(0, len(self._table), _HUB_ROWS):
            stop = min(start + _HUB_ROWS, len(self._table))
            yield from self._table.select(range(start, stop)).to_list()

    def count(self) -> int:
        """Return their number."""
        return len(self._table)

    def identity(self) -> str:
        """Return what the library knows this table by."""
        return str(self._table._fingerprint)

    @cached_property
    def _table(self) -> Any:
        hub = self.task.hub
        assert hub is not None
        try:
            with _quiet():
                return datasets.load_dataset(hub.id, hub.config, split=hub.splits[self.name], revision=hub.revision)
        except Exception as error:  # the network and the hub fail in too many ways to list
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"task '{self.task.name}': cannot load '{hub.id}' from the hub: {reason}; without a network "
                f"give --data_dir with {self.task.path}/{self.name}.jsonl.gz in it"
            ) from error


def _folder(task: Task, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        above = next(parent for parent in folder.parents if parent.exists())
        raise UserError(f"task '{task.name}': no folder {folder}; {above} holds: {listing(above)}; check --data_dir")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not (path.is_file() and is_file_name(path.name)):
            continue
        split = path.name.removesuffix(".gz").rpartition(".")[0]
        if split in files:
            raise UserError(f"{files[split]} and {path} are both split '{split}'; keep one")
        files[split] = path
    if not files:
        raise UserError(
            f"task '{task.name}': no data file in {folder}, which holds: {listing(folder)}; "
            f"put train{SUFFIXES[0]}.gz there (or {', '.join(SUFFIXES)})"
        )
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress bars and the log of retries: the error that follows says it all."""
    shown = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
