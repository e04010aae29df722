"""Show a run, or several over each other, as one HTML page that needs nothing else.

    python eval/report.py runs/glue
    python eval/report.py runs/lora runs/more --output comparison.html

While a run goes on, the page shows it as far as it is. Runs are named after their folders, or by NAME=PATH.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from more_ds import cli, log
from more_ds.errors import UserError
from more_ds.reporting.record import read_run
from more_ds.reporting.sections import run_page, runs_page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    named = [_named(text) for text in arguments.runs]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise UserError(f"two runs have the same name: {', '.join(names)}; name them: NAME=PATH")
    records = [read_run(path, name) for name, path in named]
    text = run_page(records[0]) if len(records) == 1 else runs_page(records)
    output = Path(arguments.output or (records[0].path / "report.html" if len(records) == 1 else "report.html"))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    log.say(f"written to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="eval/report.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run directory")
    parser.add_argument("--output", help="default: report.html, in the run's folder if there is only one")
    return parser


def _named(argument: str) -> tuple[str, Path]:
    """A run's name and its folder, whose path may hold an equals sign itself."""
    name, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():
        return name, Path(path)
    return Path(argument).resolve().name, Path(argument)


if __name__ == "__main__":
    sys.exit(main())
