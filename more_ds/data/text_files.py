"""Files of plain text, one output a line, and files of references in the forms that official scripts read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from more_ds.data.row_files import read_rows
from more_ds.errors import UserError
from more_ds.tasks.rows import column
from more_ds.tasks.template import TemplateError


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file (.gz or not), white space around them aside; an empty one is an empty text.

    Raises:
        UserError: the file is missing, empty, damaged or not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; check its name")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; make it again, as UTF-8 text") from error
    # Not splitlines, which also parts a line at characters that occur within texts (U+2028, say).
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not any(lines):
        raise UserError(f"{path} holds no text; one line for each example is expected")
    return lines


def read_references(paths: Sequence[Path], name: str = "references") -> list[tuple[str, ...]]:
    """Return the references of every example.

    Several files hold one reference of every example each; an empty line is no reference. One file of text holds the
    references of an example on successive lines and a blank line after them (the form of the E2E challenge), or, where
    it has no blank line, one reference a line. A .jsonl file holds rows with a text or a list of texts in column
    `name`, or in `references`.

    Raises:
        UserError: a file cannot be read, the files differ in length, or an example has no reference.
    """
    if len(paths) > 1:
        columns = [read_lines(path) for path in paths]
        _same_length({str(path): len(lines) for path, lines in zip(paths, columns, strict=True)})
        groups = [tuple(filter(None, texts)) for texts in zip(*columns, strict=True)]
    elif paths[0].name.removesuffix(".gz").endswith(".jsonl"):
        groups = _from_rows(paths[0], name)
    else:
        lines = read_lines(paths[0])
        while not lines[-1]:  # the blank line that ends the last group
            lines.pop()
        groups = [tuple(texts) for filled, texts in groupby(lines, bool) if filled] if "" in lines else [
            (line,) for line in lines
        ]  # fmt: skip
    bare = [number for number, texts in enumerate(groups, start=1) if not texts]
    if bare:
        raise UserError(f"example {bare[0]} has no reference in {', '.join(map(str, paths))}; add one, or leave it out")
    return groups


def _from_rows(path: Path, name: str) -> list[tuple[str, ...]]:
    groups = []
    for number, row in enumerate(read_rows(path), start=1):
        try:
            value = column(row, "references" if "references" in row else name)
        except TemplateError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}, row {number}: a text or a list of texts expected, found {value!r}")
        groups.append(tuple(text.strip() for text in texts if text.strip()))
    return groups


def _same_length(lengths: dict[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise UserError(f"files of different length: {found} lines; a missing reference is an empty line")
