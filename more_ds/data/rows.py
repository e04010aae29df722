"""Reading data: splits, split protocols and limits.

Rows come from the task's own `files`, else from `data_dir/<path>/<split>.<format>`, else from the hub
(`more_ds.data.sources`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from more_ds.data.row_files import Row
from more_ds.data.sources import Split, find_source
from more_ds.errors import UserError, suggest
from more_ds.tasks.render import Example, render
from more_ds.tasks.rows import in_subset, joined
from more_ds.tasks.schema import Task

IntArray = npt.NDArray[np.int64]
Part = Callable[[int], IntArray] | None
"""The numbers of a split's rows, ascending, given how many rows its source has; None: all of them."""

SPLIT_SEED = 1189
"""Seed of the split protocols: a task's test set must not depend on the seed of a run. (The
published code of MoRE halves with this number too; its permutation is another.)"""


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
    return list(rendered(task, split, _numbered(task, split, data_dir, limit, seed), plain=plain))


def rendered(task: Task, split: str, rows: Iterable[tuple[int, Row]], *, plain: bool = False) -> Iterator[Example]:
    """Yield numbered rows of a split as text.

    Raises:
        UserError: as `render`, with the split and the row.
    """
    try:
        for index, row in rows:
            yield render(task, row, index, plain=plain)
    except UserError as error:
        raise UserError(f"split '{split}': {error}") from error


@dataclass(frozen=True)
class Selection:
    """The rows of a split in its source.

    Attributes:
        source: the source's split that holds them.
        rows: yields all rows of it, those of one group joined.
        part: which of them are the split's.
        where: words for where they are.
    """

    source: Split
    rows: Callable[[], Iterator[Row]]
    part: Part
    where: str

    def count(self) -> int:
        """How many rows `rows` yields."""
        return self.source.count() if self.rows == self.source.rows else sum(1 for _ in self.rows())


def select(task: Task, split: str, data_dir: str | Path | None) -> Selection:
    """Find a split of a task in its source, by the task's split protocol.

    Raises:
        UserError: the split or its source is missing.
    """
    source, where = find_source(task, data_dir)
    base, part = _protocol(task, split, source, where)
    found = source[base]
    rows = found.rows if task.group is None else lambda: iter(joined(task, found.rows()))
    return Selection(found, rows, part, where)


def require_rows(task: Task, split: str, where: str, count: int) -> None:
    """Refuse a split without rows."""
    if not count:
        raise UserError(f"task '{task.name}': split '{split}' has no rows ({where}); add some, or drop the task")


def _numbered(
    task: Task, split: str, data_dir: str | Path | None, limit: int | None, seed: int
) -> list[tuple[int, Row]]:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; give a positive number of rows")
    is_subset = split in task.subsets and split not in find_source(task, data_dir)[0]
    selection = select(task, "test" if is_subset else split, data_dir)
    keep = selection.part(selection.count()) if selection.part is not None else None
    if is_subset:
        numbered = _picked(selection, keep)
        inside = in_subset(task, split, [row for _, row in numbered])
        keep = np.array([i for (i, _), is_in in zip(numbered, inside, strict=True) if is_in], dtype=np.int64)
    if limit is not None:
        keep = np.arange(selection.count()) if keep is None else keep
        chosen = np.random.RandomState(seed).permutation(len(keep))[:limit]
        keep = keep[np.sort(chosen)]
    rows = _picked(selection, keep)
    require_rows(task, split, selection.where, len(rows))
    return rows


def _picked(selection: Selection, keep: IntArray | None) -> list[tuple[int, Row]]:
    """The rows of ascending numbers; all are read, so that damage is found whichever are wanted."""
    if keep is None:
        return list(enumerate(selection.rows()))
    wanted = set(keep.tolist())
    return [(number, row) for number, row in enumerate(selection.rows()) if number in wanted]


def _protocol(task: Task, split: str, source: Mapping[str, Split], where: str) -> tuple[str, Part]:
    """Return the source's split that holds `split`, and which of its rows are in it."""
    kind, size = task.split.kind, task.split.size
    if kind == "halve_validation" and "test" not in source and "validation" in source:
        if split in ("validation", "test"):
            return "validation", lambda n: _cut(n, n // 2, first=split == "validation")
    elif kind == "carve_train" and not {"validation", "test"} <= set(source) and "train" in source:
        if split in ("train", "validation"):
            return "train", lambda n: _cut(n, _room(task, size, n), first=split == "validation")
        if split == "test" and "test" not in source and "validation" in source:
            return "validation", None
    if split not in source:
        raise UserError(
            f"task '{task.name}': no split '{split}' ({where}){suggest(split, source)}"
            "; add it, or set the task's split protocol"
        )
    return split, None


def _cut(count: int, size: int, *, first: bool) -> IntArray:
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
