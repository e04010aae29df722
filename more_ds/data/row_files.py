"""Files of rows: JSON lines, CSV, TSV and Parquet, gzip-compressed or not.

JSON lines and CSV are read with the standard library, not with `datasets`: no types are guessed, texts arrive as they
are written, a mistake has a line number, and ranks that load at the same time share no cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow
import pyarrow.parquet

from more_ds.errors import UserError

Row = dict[str, Any]
_PARQUET_ROWS = 4096


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv, .tsv or .parquet file, gzip-compressed (.gz) or not, one by one.

    The values of CSV and TSV are text. Blank lines are skipped.

    Raises:
        UserError: the file is missing or damaged; with the line where that is known.
    """
    name = path.name.removesuffix(".gz")
    with readable(path):
        if name.endswith(".parquet"):
            with _binary(path) as stream:
                table = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream))
                for batch in table.iter_batches(_PARQUET_ROWS):
                    yield from batch.to_pylist()
            return
        with _text(path) as text:
            if name.endswith(".jsonl"):
                yield from _json_lines(text, path)
            else:
                yield from _csv_rows(text, path, "\t" if name.endswith(".tsv") else ",")


def count_rows(path: Path) -> int:
    """Return the number of rows that `read_rows` yields; JSON lines are counted without being parsed.

    Raises:
        UserError: as `read_rows`.
    """
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return sum(1 for _ in read_rows(path))
    with readable(path), _text(path) as text:
        return sum(1 for line in text if line.strip())


def listing(folder: Path) -> str:
    """Return the first names in a folder, for a message about one that is not there."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "nothing") + more


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a file that is read inside.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.is_file():
        folder = path.parent
        raise UserError(f"no file {path}; {folder} holds: {listing(folder)}; check its name")
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: {reason}; make or fetch it again") from error


def _binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path) -> TextIO:
    # utf-8-sig: spreadsheets put a byte order mark in front, which is no part of a column name.
    return io.TextIOWrapper(_binary(path), encoding="utf-8-sig", newline="")


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
