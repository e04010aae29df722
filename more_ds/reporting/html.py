"""The parts of a page: everything that a user has written is escaped here, and nothing runs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = Path(__file__).with_name("page.css")
# No script runs and nothing is fetched, whatever a name in the page says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(value: Any) -> str:
    """A value as text of the page."""
    return html.escape(str(value))


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A titled part of the page; none where there is nothing to show."""
    shown = [part for part in parts if part]
    if not shown:
        return ""
    lead = [f'<p class="note">{escape(note)}</p>'] if note else []
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *lead, *shown, "</section>"])


def folded(title: str, *parts: str) -> str:
    """A part that is opened by a click."""
    return "\n".join([f"<details><summary>{escape(title)}</summary>", *parts, "</details>"])


def warning(text: str) -> str:
    """A sentence that must not be overlooked."""
    return f'<p class="warning" role="alert">{escape(text)}</p>'


def paragraph(text: str) -> str:
    """A sentence."""
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], labels: int = 1) -> str:
    """A table whose first columns are labels; floats with two decimals, None as a dash."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    tags = ["th"] * labels + ["td"] * (len(header) - labels)
    body = [
        "<tr>" + "".join(f"<{tag}>{_cell(value)}</{tag}>" for tag, value in zip(tags, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return "\n".join(
        ['<div class="wide"><table>', f"<thead><tr>{head}</tr></thead><tbody>", *body, "</tbody></table></div>"]
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values, several beside each other."""
    items = [f"<div><dt>{escape(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in values.items()]
    return "\n".join(["<dl>", *items, "</dl>"])


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    low: float,
    high: float,
    decimals: int = 0,
) -> str:
    """A table whose cells are the darker, the further a value is from `low` on its way to `high`.

    Values below zero have another colour. None is an empty cell.
    """
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in columns)
    body = [
        f"<tr><th>{escape(name)}</th>" + "".join(_heat_cell(v, low, high, decimals) for v in row) + "</tr>"
        for name, row in zip(rows, values, strict=True)
    ]
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f'<table class="heat">{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def beside(*parts: str) -> str:
    """Parts next to each other, as many as there is room for."""
    return '<div class="beside">' + "".join(parts) + "</div>"


def flip(frames: Mapping[str, str], group: int) -> str:
    """Frames of which one is shown, chosen by its name; the last at first. `group` differs from others on the page."""
    parts = []
    for i, name in enumerate(frames):
        checked = " checked" * (i == len(frames) - 1)
        parts.append(f'<label><input type="radio" name="flip{group}"{checked}>{escape(name)}</label>')
    bodies = [f'<div class="frame">{frame}</div>' for frame in frames.values()]
    rules = "".join(
        f".flip{group}:has(label:nth-of-type({i + 1}) input:checked) > .frame:nth-of-type({i + 1}){{display:block}}"
        for i in range(len(frames))
    )
    return f'<style>{rules}</style><div class="flip flip{group}">{"".join(parts)}{"".join(bodies)}</div>'


def _heat_cell(value: float | None, low: float, high: float, decimals: int) -> str:
    if value is None:
        return "<td></td>"
    share = round(100 * min(1.0, max(0.0, (abs(value) - low) / ((high - low) or 1.0))))
    kind = ' class="below"' if value < 0 else ""
    return f'<td{kind} style="--v:{share}%">{value:.{decimals}f}</td>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else escape(value)
