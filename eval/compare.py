"""Lay results side by side: `python eval/compare.py runs/lora/eval/glue-test runs/more/eval/glue-test`.

Columns are named after their paths, or by NAME=PATH. `--paired` tests the difference of two of them, `--paper` adds
published numbers, `--output table.tex` (or .md, .html, .json) writes a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from more_ds import cli, log
from more_ds.compare.comparison import comparison_tables, load_systems
from more_ds.compare.pairing import paired_tables
from more_ds.compare.published import GROUPS, load_published
from more_ds.compare.tables import FORMATS, as_json
from more_ds.errors import UserError
from more_ds.results import RESULTS

SUFFIXES = {".md": "markdown", ".tex": "latex", ".html": "html", ".json": "json"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the tables: exit code 0, or 2 after a mistake in the input."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    output = Path(arguments.output) if arguments.output else None
    form = arguments.format or SUFFIXES.get(output.suffix if output else "", "table")
    systems = load_systems(_names(arguments.results))
    published = load_published(arguments.paper) if arguments.paper else []
    tables = comparison_tables(systems, published, all_metrics=arguments.all_metrics, decimals=arguments.decimals)
    tables = [table.transposed() for table in tables] if arguments.transpose else tables
    if arguments.paired:
        tables += paired_tables(systems, all_metrics=arguments.all_metrics, resamples=arguments.resamples)
    texts = [as_json(tables)] if form == "json" else [FORMATS[form](table, arguments.decimals) for table in tables]
    text = "\n\n".join(texts)
    if output is None:
        log.say(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
        log.say(f"written to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="eval/compare.py", description="Lay results side by side.", allow_abbrev=False)
    add = parser.add_argument
    add("results", nargs="+", metavar="[NAME=]PATH", help="folder with a results.json, or the file")
    add("--paired", action="store_true", help="test the difference of two results, by their predictions")
    add("--resamples", type=cli.positive, default=1000, help="of the paired bootstrap")
    add("--paper", nargs="?", const=GROUPS[0], choices=GROUPS, help="add published numbers")
    add("--all_metrics", action="store_true", help="every metric; default: the tasks' primary ones")
    add("--transpose", action="store_true", help="a row for each system, as papers print it")
    add("--decimals", type=int, choices=range(5), default=2, metavar="0-4", help="shown")
    add("--format", choices=[*FORMATS, "json"], help="default: by the suffix of --output, else a plain table")
    add("--output", help="a file to write, e.g. table.tex")
    return parser


def _names(arguments: Sequence[str]) -> dict[str, Path]:
    """Paths by the names of their columns: as given, else the part of the path that differs from the others'."""
    pairs = [_named(argument) for argument in arguments]
    parts = [[part for part in path.parts if part != RESULTS] for _, path in pairs]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    names = [name or str(Path(*part)) for (name, _), part in zip(pairs, parts, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"two columns have the same name: {', '.join(names)}; name them: NAME=PATH")
    return {name: path for name, (_, path) in zip(names, pairs, strict=True)}


def _named(argument: str) -> tuple[str, Path]:
    """A column's own name, if it has one, and its path, which may hold an equals sign itself."""
    name, equals, path = argument.partition("=")
    return (name, Path(path)) if equals and not Path(argument).exists() else ("", Path(argument))


if __name__ == "__main__":
    sys.exit(main())
