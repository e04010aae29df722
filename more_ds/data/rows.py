"""Reading data: files of rows, the hub, split protocols and limits.

Rows come from the task's own `files`, else from `data_dir/<path>/<split>.<format>`, else from the
hub. JSON lines and CSV are read with the standard library, not with `datasets`: no types are
guessed, texts arrive as they are written, a mistake has a line number, and ranks that load at the
same time share no cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from more_ds.errors import UserError, suggest
from more_ds.tasks.render import Example, render
from more_ds.tasks.rows import in_subset, joined
from more_ds.tasks.schema import Task
from more_ds.tasks.suite import SUFFIXES, is_file_name

SPLIT_SEED = 1189
"""Seed of the split protocols: a task's test set must not depend on the seed of a run. (The
published code of MoRE halves with this number too; its permutation is another.)"""

Row = dict[str, Any]


def load_split(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """Return the rows of a split, in the order of their source.

    Args:
        split: `train`, `validation`, `test` or one of `task.extra_tests`.
        data_dir: folder with `<task.path>/<split>.jsonl.gz` (or .jsonl, .csv, .tsv, .parquet).
        limit: keep this many rows: the first of a permutation that `seed` decides, so that a
            smaller limit keeps a subset of a larger one's.

    Raises:
        UserError: the split, its file or the hub is missing or damaged, or there are no rows.
    """
    return [row for _, row in _numbered(task, split, data_dir, limit, seed)]


def load_examples(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    plain: bool = False,
) -> list[Example]:
    """Return the rows of a split as text (arguments as `load_split`, `plain` as `render`).

    An example with several references is one example; `expand` makes training examples of it.

    Raises:
        UserError: as `load_split` and `render`, with the split and the row.
    """
    rows = _numbered(task, split, data_dir, limit, seed)
    try:
        return [render(task, row, index, plain=plain) for index, row in rows]
    except UserError as error:
        raise UserError(f"split '{split}': {error}") from error


def _numbered(
    task: Task, split: str, data_dir: str | Path | None, limit: int | None, seed: int
) -> list[tuple[int, Row]]:
    source, where = _source(task, data_dir)
    is_subset = split in task.subsets and split not in source
    base, part = _protocol(task, "test" if is_subset else split, source, where)
    rows = joined(task, source[base]())
    keep = part(len(rows))
    if is_subset:
        keep = keep[in_subset(task, split, [rows[i] for i in keep])]
    if limit is not None:
        if limit < 1:
            raise UserError(f"limit is {limit}; give a positive number of rows")
        chosen = np.random.RandomState(seed).permutation(len(keep))[:limit]
        keep = keep[np.sort(chosen)]
    if not len(keep):
        raise UserError(f"task '{task.name}': split '{split}' has no rows ({where}); add some, or drop the task")
    return [(int(i), rows[i]) for i in keep]


Source = Mapping[str, Callable[[], list[Row]]]
Part = Callable[[int], "np.ndarray[Any, np.dtype[np.int64]]"]


def _protocol(task: Task, split: str, source: Source, where: str) -> tuple[str, Part]:
    """Return the source's split that holds `split`, and which of its rows are in it."""
    kind, size = task.split.kind, task.split.size
    if kind == "halve_validation" and "test" not in source and "validation" in source:
        if split in ("validation", "test"):
            return "validation", lambda n: _cut(n, n // 2, first=split == "validation")
    elif kind == "carve_train" and not {"validation", "test"} <= set(source) and "train" in source:
        if split in ("train", "validation"):
            return "train", lambda n: _cut(n, _room(task, size, n), first=split == "validation")
        if split == "test" and "test" not in source and "validation" in source:
            return "validation", np.arange
    if split not in source:
        raise UserError(
            f"task '{task.name}': no split '{split}' ({where}){suggest(split, source)}"
            "; add it, or set the task's split protocol"
        )
    return split, np.arange


def _cut(count: int, size: int, *, first: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return `size` of `count` rows, or the others, in ascending order."""
    # RandomState, not Generator: NumPy promises that its stream never changes.
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    return np.sort(order[:size] if first else order[size:])


def _room(task: Task, size: int, count: int) -> int:
    if size >= count:
        raise UserError(
            f"task '{task.name}': split carve_train takes {size} rows of train, which has {count}; take fewer"
        )
    return size


def _source(task: Task, data_dir: str | Path | None) -> tuple[Source, str]:
    """Return the splits that the task's data come in, and words for where they are."""
    if task.files:
        files, where = dict(task.files), "files of the tasks file"
    elif data_dir is not None:
        folder = Path(data_dir) / task.path
        files, where = _folder(task, folder), f"in {folder}"
    elif task.hub is not None:
        names = task.hub.splits
        return {name: partial(_hub_rows, task, name) for name in names}, f"of {task.hub.id}"
    else:
        raise UserError(
            f"task '{task.name}' names no hub data set and no files; give --data_dir with {task.path}/train.jsonl in it"
        )
    return {name: partial(read_rows, path) for name, path in files.items()}, where


def _folder(task: Task, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        above = next(parent for parent in folder.parents if parent.exists())
        raise UserError(f"task '{task.name}': no folder {folder}; {above} holds: {_listing(above)}; check --data_dir")
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
            f"task '{task.name}': no data file in {folder}, which holds: {_listing(folder)}; "
            f"put train{SUFFIXES[0]}.gz there (or {', '.join(SUFFIXES)})"
        )
    return files


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "nothing") + more


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a .jsonl, .csv, .tsv or .parquet file, gzip-compressed (.gz) or not.

    The values of CSV and TSV are text. Blank lines are skipped.

    Raises:
        UserError: the file is missing or damaged; with the line where that is known.
    """
    if not path.is_file():
        folder = path.parent
        raise UserError(f"no file {path}; {folder} holds: {_listing(folder)}; check its name")
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            with _binary(path) as stream:
                return list(pyarrow.parquet.read_table(pyarrow.PythonFile(stream)).to_pylist())
        # utf-8-sig: spreadsheets put a byte order mark in front, which is no part of a column name.
        with io.TextIOWrapper(_binary(path), encoding="utf-8-sig", newline="") as text:
            if name.endswith(".jsonl"):
                return list(_json_lines(text, path))
            return list(_csv_rows(text, path, "\t" if name.endswith(".tsv") else ","))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: {reason}; make or fetch it again") from error


def _binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_lines(text: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}; mend it") from error
        if not isinstance(row, dict):
            found = line.strip()[:60]
            raise UserError(f"{path}, line {number} is no JSON object: {found}; mend it")
        yield row


def _csv_rows(text: TextIO, path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"{path}: an empty or repeated column name in {names}; mend it")
        for values in reader:
            if len(values) == len(names):
                yield dict(zip(names, values, strict=True))
            elif values:  # a blank line has none
                found = f"{len(values)} fields, the header {len(names)}"
                raise UserError(f"{path}, line {reader.line_num} has {found}; mend or quote it")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend or quote it") from error


def _hub_rows(task: Task, split: str) -> list[Row]:
    hub = task.hub
    assert hub is not None
    try:
        with _quiet():
            table = datasets.load_dataset(hub.id, hub.config, split=hub.splits[split], revision=hub.revision)
            return list(table.to_list())
    except Exception as error:  # the network and the hub fail in too many ways to list
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"task '{task.name}': cannot load '{hub.id}' from the hub: {reason}; without a network "
            f"give --data_dir with {task.path}/{split}.jsonl.gz in it"
        ) from error


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
