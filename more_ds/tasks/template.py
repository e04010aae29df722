"""Text templates for tasks: `{column}`, and `{{` or `}}` for a literal brace. Nothing else.

`str.format` would let a tasks file reach into objects (`{a.__class__}`, `{a[0]}`, `{a!r:>9}`),
so the few rules needed are written out here: a placeholder is the name of a column, and what is
put in its place is never looked at again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_COLUMN = re.compile(r"\w[\w -]*")


class TemplateError(ValueError):
    """A template, or a row that does not fit it; the message lacks the place, callers add it."""


@lru_cache(maxsize=4096)
def parse(template: str) -> tuple[tuple[str, bool], ...]:
    """Cut `template` into (text, is_column) parts.

    Raises:
        TemplateError: a stray brace, or a placeholder that is not a plain column name.
    """
    parts: list[tuple[str, bool]] = []
    end = 0
    for token in _TOKEN.finditer(template):
        parts.append((template[end : token.start()], False))
        end = token.end()
        name = token.group(1)
        if token.group() in ("{{", "}}"):
            parts.append((token.group()[0], False))
        elif name is None:
            raise TemplateError(
                f"lone '{token.group()}' in template {template!r}; write '{token.group() * 2}' for a literal brace"
            )
        elif not _COLUMN.fullmatch(name):
            raise TemplateError(
                f"'{{{name}}}' in template {template!r} is not a column name (letters, digits, "
                f"'_', '-', spaces; no '.', '[', '!', ':')"
            )
        else:
            parts.append((name, True))
    parts.append((template[end:], False))
    return tuple(part for part in parts if part[0])


def columns(template: str) -> tuple[str, ...]:
    """Return the columns that `template` needs, in order of appearance, each once."""
    return tuple(dict.fromkeys(text for text, is_column in parse(template) if is_column))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Return `template` with its placeholders replaced by the values of `row`.

    Surrounding white space is removed, so that prompts of data with trailing blanks (SST-2) end
    alike. Numbers are written as Python writes them, booleans as `true` and `false`.

    Raises:
        TemplateError: a column that the row lacks, or whose value is no text, number or boolean.
    """
    pieces = [_value(text, row) if is_column else text for text, is_column in parse(template)]
    return "".join(pieces).strip()


def _value(column: str, row: Mapping[str, Any]) -> str:
    if column not in row:
        raise TemplateError(f"no column '{column}'; found: {', '.join(sorted(map(str, row)))}")
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    what = "empty" if value is None else f"a {type(value).__name__}"
    raise TemplateError(f"column '{column}' is {what}; a template needs text or a number")
