"""Command-line flags from the configuration's fields: `--key value`, `--adapter.key value`."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import yaml

from more_ds import log
from more_ds.config import RunConfig
from more_ds.errors import TrainingError, UserError, suggest

NESTED = ("adapter", "sampling_weights")
"""Fields whose keys are flags of their own."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a user's mistakes: one line, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def config_parser(description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser with one flag for each field of `RunConfig`, and no abbreviations."""
    parser = Parser(
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("the run (keys of a recipe; a flag overrides the recipe)")
    for f in fields(RunConfig):
        metavar = "KEY VALUE" if f.name in NESTED else "VALUE"
        if f.name in NESTED:
            group.add_argument(f"--{f.name}.KEY", dest=f.name, metavar="VALUE", help=f.metadata["help"])
        elif typing.get_type_hints(RunConfig)[f.name] is bool:
            group.add_argument(
                f"--{f.name}", nargs="?", const="true", default=argparse.SUPPRESS, metavar="true|false",
                help=f.metadata["help"],
            )  # fmt: skip
        else:
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=metavar, help=f.metadata["help"])
    return parser


def positive(text: str) -> int:
    """The type of a flag that takes a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse flags into (the parser's own arguments, keys for the configuration).

    Flags may be written with dashes or underscores.

    Raises:
        UserError: an unknown flag, with the nearest known one.
    """
    argv = [_underscores(arg) for arg in argv]
    plain, nested = _take_nested(argv)
    arguments, unknown = parser.parse_known_args(plain)
    if unknown:
        known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0].lstrip("-")
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(name, known)}")
    names = {f.name for f in fields(RunConfig)}
    values = {key: value for key, value in vars(arguments).items() if key in names and key not in NESTED}
    return arguments, values | nested


def run(main: Callable[[], None]) -> int:
    """Run a command: a user's mistake is one line and exit code 2, a run that cannot go on one line and 1."""
    try:
        main()
    except UserError as error:
        _say_once(error)
        return 2
    except TrainingError as error:
        _say_once(error)
        return 1
    return 0


def _say_once(error: Exception) -> None:
    """All ranks of a machine meet the same mistake; the first one names it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.fail(str(error))


def _take_nested(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    plain: list[str] = []
    nested: dict[str, Any] = {}
    arguments = iter(argv)
    for arg in arguments:
        name, _, value = arg.partition("=")
        field_name, _, key = name.lstrip("-").partition(".")
        if arg.startswith("--") and field_name in NESTED and key:
            text = value if "=" in arg else next(arguments, None)
            if text is None:
                raise UserError(f"{name} needs a value")
            nested.setdefault(field_name, {})[key] = yaml.safe_load(text)
        else:
            plain.append(arg)
    return plain, nested


def _underscores(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
