"""Text files as blocks of token ids, and which blocks a step reads: a pure function of the seed and the step."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from more_ds.errors import UserError, suggest

Blocks = NDArray[np.int32]
HELD_OUT = 100
"""Every so manieth document is held out."""
_SUFFIXES = (".txt", ".jsonl")


def read_documents(paths: Sequence[Path], column: str) -> Iterator[str]:
    """Yield the texts of files: of `.jsonl` a row's `column`, of `.txt` what stands between blank lines; `.gz` of both.

    Raises:
        UserError: a file is missing, damaged or of another kind, or a row has no text in that column.
    """
    for path in paths:
        kind = Path(path.name.removesuffix(".gz")).suffix
        if kind not in _SUFFIXES:
            raise UserError(f"{path} is of an unknown kind; give .txt, .txt.gz, .jsonl or .jsonl.gz")
        yield from _rows(path, column) if kind == ".jsonl" else _paragraphs(path)


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to learn from, and those held out: every hundredth, the last of them at least.

    Raises:
        UserError: there are fewer than two.
    """
    if len(documents) < 2:
        raise UserError(f"{len(documents)} texts in the files; two or more are needed, as some are held out")
    held = [text for i, text in enumerate(documents) if i % HELD_OUT == HELD_OUT - 1]
    if not held:
        return list(documents[:-1]), list(documents[-1:])
    return [text for i, text in enumerate(documents) if i % HELD_OUT != HELD_OUT - 1], held


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Blocks:
    """Tokenise documents, end each with EOS, and cut their sequence into blocks, (blocks, length).

    What is left at the end is filled up from the beginning, so that nothing is lost.
    """
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    stream = np.array([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)], dtype=np.int32)
    count = -(-len(stream) // length)
    return np.resize(stream, count * length).reshape(count, length)


class BlockOrder:
    """Which block comes when: each epoch reads every block once, in an order of its own."""

    def __init__(self, blocks: int, per_step: int, seed: int) -> None:
        """Plan the reading of `blocks` blocks, `per_step` in a step of all ranks."""
        self.blocks, self.per_step, self.seed = blocks, per_step, seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def step(self, step: int) -> list[int]:
        """The blocks of a step, counted from 0; the same whatever was asked for before."""
        return [self._at(step * self.per_step + i) for i in range(self.per_step)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.blocks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
        return int(self._order[place])


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in [*_text(path).split("\n"), ""]:
        if line.strip():
            lines.append(line.strip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _rows(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            known = row if isinstance(row, dict) else ()
            raise UserError(
                f"{path}, line {number}: no text in column '{column}'{suggest(column, known)}; use --column"
            )
        if text.strip():
            yield text


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no file {path}; check its name")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; make it again, as UTF-8 text") from error
