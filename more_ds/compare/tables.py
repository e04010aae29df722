"""Tables of numbers with errors and footnotes, as plain text, Markdown, LaTeX, HTML and JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from more_ds import log

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: "\\" + character for character in "&%$#_{}"
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


@dataclass(frozen=True)
class Cell:
    """A label, or a number with what belongs to it.

    Attributes:
        value: a text, a number, or None (nothing is known).
        error: standard error of the number.
        marks: letters of its footnotes.
        is_best: whether it is the best of its row.
        decimals: shown of the number; None: as many as of the table's others.
    """

    value: float | str | None
    error: float | None = None
    marks: str = ""
    is_best: bool = False
    decimals: int | None = None

    def digits(self, decimals: int) -> tuple[str, str]:
        """The number and its error with `decimals`, or as many as the cell asks for; empty: no error."""
        places = decimals if self.decimals is None else self.decimals
        return f"{self.value:.{places}f}", f"{self.error:.{places}f}" if self.error is not None else ""


@dataclass(frozen=True)
class Table:
    """Rows that begin with labels and go on with numbers.

    Attributes:
        title: of the whole.
        header: names of the columns.
        rows: cells, as many in each as the header has.
        labels: how many columns are labels.
        notes: footnotes by letter.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    labels: int
    notes: Mapping[str, str]

    def transposed(self) -> Table:
        """The same with a row for each column of numbers; a row's labels become the title of its column."""
        names = [" ".join(str(cell.value) for cell in row[: self.labels] if cell.value) for row in self.rows]
        rows = [
            [Cell(name), *(row[i] for row in self.rows)]
            for i, name in enumerate(self.header[self.labels :], self.labels)
        ]
        return Table(self.title, ["system", *names], rows, 1, self.notes)


def as_text(table: Table, decimals: int) -> str:
    """For the terminal; a star stands at the best number."""

    def show(cell: Cell) -> str:
        if cell.value is None or isinstance(cell.value, str):
            return cell.value or "-" * (cell.value is None)
        number, error = cell.digits(decimals)
        number += f" ± {error}" if error else ""
        return number + "*" * cell.is_best + (f" {cell.marks}" if cell.marks else "")

    body = log.table(table.header, [[show(cell) for cell in row] for row in table.rows])
    return "\n".join([table.title, body, *(f"{mark}: {note}" for mark, note in table.notes.items())])


def as_markdown(table: Table, decimals: int) -> str:
    """A GitHub table; the best number is bold."""

    def escape(text: str) -> str:
        return MARKDOWN.sub(r"\\\1", text)

    def show(cell: Cell) -> str:
        if cell.value is None or isinstance(cell.value, str):
            return escape(cell.value or "") if cell.value is not None else "–"
        number, error = cell.digits(decimals)
        number = f"**{number}**" if cell.is_best else number
        return number + (f" ± {error}" if error else "") + (f" <sup>{cell.marks}</sup>" if cell.marks else "")

    lines = [[escape(name) for name in table.header]]
    lines.append([":--"] * table.labels + ["--:"] * (len(table.header) - table.labels))
    lines += [[show(cell) for cell in row] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"<sup>{mark}</sup> {escape(note)}  " for mark, note in table.notes.items()]
    return "\n".join([f"**{escape(table.title)}**", "", body, *([""] if notes else []), *notes])


def as_latex(table: Table, decimals: int) -> str:
    """A `tabular` with the rules of booktabs; the best number is bold."""

    def escape(text: str) -> str:
        return "".join(LATEX.get(character, character) for character in text)

    def show(cell: Cell) -> str:
        if cell.value is None or isinstance(cell.value, str):
            return escape(cell.value or "") if cell.value is not None else "--"
        number, error = cell.digits(decimals)
        number = f"\\textbf{{{number}}}" if cell.is_best else number
        number += f" {{\\scriptsize $\\pm$ {error}}}" if error else ""
        return number + (f"\\textsuperscript{{{cell.marks}}}" if cell.marks else "")

    columns = len(table.header)
    lines = [
        f"% {' '.join(table.title.split())}",
        f"\\begin{{tabular}}{{{'l' * table.labels}{'r' * (columns - table.labels)}}}",
        "\\toprule",
        " & ".join(escape(name) for name in table.header) + r" \\",
        "\\midrule",
        *(" & ".join(show(cell) for cell in row) + r" \\" for row in table.rows),
        "\\bottomrule",
        *(
            f"\\multicolumn{{{columns}}}{{l}}{{\\footnotesize \\textsuperscript{{{mark}}} {escape(note)}}} \\\\"
            for mark, note in table.notes.items()
        ),
        "\\end{tabular}",
    ]
    return "\n".join(lines)


def as_html(table: Table, decimals: int) -> str:
    """A `<table>` without a style of its own; the best number is strong."""

    def show(cell: Cell) -> str:
        if cell.value is None or isinstance(cell.value, str):
            return html.escape(cell.value or "") if cell.value is not None else "–"
        number, error = cell.digits(decimals)
        number = f"<strong>{number}</strong>" if cell.is_best else number
        return number + (f" ± {error}" if error else "") + (f" <sup>{cell.marks}</sup>" if cell.marks else "")

    tags = ["th"] * table.labels + ["td"] * (len(table.header) - table.labels)
    lines = [
        f"<table><caption>{html.escape(table.title)}</caption>",
        f"<thead><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in table.header)}</tr></thead>",
        "<tbody>",
        *(
            f"<tr>{''.join(f'<{tag}>{show(cell)}</{tag}>' for tag, cell in zip(tags, row, strict=True))}</tr>"
            for row in table.rows
        ),
        "</tbody>",
        *(
            f'<tfoot><tr><td colspan="{len(table.header)}"><sup>{mark}</sup> {html.escape(note)}</td></tr></tfoot>'
            for mark, note in table.notes.items()
        ),
        "</table>",
    ]
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Table, int], str]] = {
    "table": as_text,
    "markdown": as_markdown,
    "latex": as_latex,
    "html": as_html,
}


def as_json(tables: Sequence[Table]) -> str:
    """All numbers, unrounded."""

    def show(cell: Cell) -> Any:
        if cell.value is None or isinstance(cell.value, str):
            return cell.value
        return {"value": cell.value, "error": cell.error, "marks": list(cell.marks), "best": cell.is_best}

    return json.dumps(
        [
            {
                "title": table.title,
                "rows": [
                    {name: show(cell) for name, cell in zip(table.header, row, strict=True)} for row in table.rows
                ],
                "notes": dict(table.notes),
            }
            for table in tables
        ],
        indent=2,
        ensure_ascii=False,
    )
