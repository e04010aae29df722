"""Write the demo's tasks: `<data_dir>/demo/<task>/{train,validation,test}.jsonl.gz`.

Same seed, same bytes: each task has a random stream of its own, so that one task's size does
not change another's rows. No input occurs twice in a task, in whichever split.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

from more_ds.demo.rows import DRAWS, Row

SEED = 20240229
HELD_OUT = 240
"""Rows of validation, and of test."""

TRAIN_ROWS = {
    "acceptability": 4500,
    "sentiment": 12000,
    "paraphrase": 1800,
    "entailment": 9000,
    "qa_sentence": 6000,
    "similarity": 2500,
    "boolean": 3000,
    "multiple_choice": 400,
    "data_to_text": 600,
}
"""As uneven as real collections are."""


def task_rows(task: str, seed: int = SEED) -> dict[str, list[Row]]:
    """Return the rows of a task by split.

    Args:
        task: a key of `TRAIN_ROWS`.
        seed: of the whole suite.
    """
    rng = random.Random(zlib.crc32(task.encode()) ^ seed)
    sizes = {"validation": HELD_OUT, "test": HELD_OUT, "train": TRAIN_ROWS[task]}
    rows = _distinct(DRAWS[task], rng, sum(sizes.values()))
    splits: dict[str, list[Row]] = {}
    start = 0
    for split, size in sizes.items():
        splits[split] = rows[start : start + size]
        start += size
    return splits


def _distinct(draw: Callable[[random.Random], Row], rng: random.Random, count: int) -> list[Row]:
    """Draw rows until `count` of different inputs are there (the label is no part of an input)."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = draw(rng)
        rows.setdefault(input_key(row), row)
    return list(rows.values())


def input_key(row: Row) -> str:
    """Return what a model reads of a row, as one string: equal for two rows of one input."""
    inputs = {k: v for k, v in row.items() if k not in ("label", "answer", "references")}
    return json.dumps(inputs, sort_keys=True)


def write_tasks(data_dir: Path) -> None:
    """Write all tasks below `data_dir`."""
    for task in TRAIN_ROWS:
        folder = data_dir / "demo" / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in task_rows(task).items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            # A time stamp or a file name in the gzip header would make every call's bytes differ.
            packed = gzip.compress(lines.encode(), compresslevel=6, mtime=0)
            (folder / f"{split}.jsonl.gz").write_bytes(packed)
