"""Command-line flags from the configuration's fields: `--key value`, `--adapter.key value`."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from more_ds import log
from more_ds.command import Parser, run
from more_ds.config import RunConfig, build
from more_ds.errors import PREEMPTED, UserError, suggest
from more_ds.methods import METHODS

__all__ = ["NESTED", "Parser", "config_parser", "merged", "parse", "run"]

NESTED = ("adapter", "sampling_weights")
"""Fields whose keys are flags of their own."""

EXIT_CODES = f"""exit codes: 0 done; 1 the run cannot go on (the last checkpoint is as it was);
2 a mistake in the input; {PREEMPTED} asked to stop and saved (go on with --resume auto)"""


def config_parser(description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser with one flag for each field of `RunConfig`, and no abbreviations."""
    parser = Parser(
        description=description,
        usage=usage,
        epilog=EXIT_CODES,
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


def positives(text: str) -> list[int]:
    """The type of a flag that wants one or several counts, separated by commas."""
    return [positive(part) for part in text.split(",")]


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


def merged(recipe: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> RunConfig:
    """The configuration of a recipe with flags over it; a nested flag replaces its own key alone.

    A flag that names another method than the recipe's leaves out the recipe's options that the method does not have,
    and says so.

    Raises:
        UserError: unknown keys or wrong values; `origin` names where they came from.
    """
    method, options = flags.get("method"), recipe.get("adapter") or {}
    if method in METHODS and method != recipe.get("method", "more"):
        foreign = [key for key in options if key not in METHODS[method].options]
        if foreign:
            log.say(f"{origin}: {', '.join(foreign)} of its adapter mean nothing to {method}; left out")
        recipe = {**recipe, "adapter": {key: value for key, value in options.items() if key not in foreign}}
    nested = {name: {**(recipe.get(name) or {}), **flags[name]} for name in NESTED if name in flags}
    return build({**recipe, **flags, **nested}, origin)


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
            try:
                nested.setdefault(field_name, {})[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise UserError(f"{name} {text!r} is not YAML: {' '.join(str(error).split())[:200]}") from error
        else:
            plain.append(arg)
    return plain, nested


def _underscores(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
