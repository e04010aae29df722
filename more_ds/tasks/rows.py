"""Rows before they become text: those that say the same joined into one, and subsets by a column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from more_ds.errors import UserError
from more_ds.tasks.schema import Task, label_key
from more_ds.tasks.template import TemplateError

Row = Mapping[str, Any]


def column(row: Row, name: str) -> Any:
    """Return a column's value; a dot in `name` reaches into a mapping, or into each mapping of a list.

    Raises:
        TemplateError: there is none.
    """
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head) if rest else None
    if isinstance(inner, Mapping):
        return column(inner, rest)
    if isinstance(inner, (list, tuple)) and all(isinstance(item, Mapping) for item in inner):
        return [column(item, rest) for item in inner]
    raise TemplateError(f"no column '{name}'; found: {', '.join(sorted(map(str, row)))}")


def joined(task: Task, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the rows that have the same text in `task.group`, in order of first appearance.

    Of the references a list is made; the other columns are the first row's.

    Raises:
        UserError: a column is missing.
    """
    if task.group is None or task.references is None:
        return list(rows)
    references: dict[str, list[Any]] = {}
    first: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(rows):
        try:
            key, reference = str(column(row, task.group)), column(row, task.references)
        except TemplateError as error:
            raise UserError(f"task '{task.name}', row {index}: {error}") from error
        first.setdefault(key, row)
        references.setdefault(key, []).extend(reference if isinstance(reference, list) else [reference])
    return [{**row, task.references: references[key]} for key, row in first.items()]


def in_subset(task: Task, split: str, rows: Sequence[Row]) -> list[bool]:
    """Whether each row of the test set belongs to its subset `split`.

    Raises:
        UserError: a column is missing.
    """
    wanted = task.subsets[split]
    try:
        return [all(label_key(column(row, name)) == key for name, key in wanted.items()) for row in rows]
    except ValueError as error:
        raise UserError(f"task '{task.name}', subset '{split}': {error}") from error
