"""How a command of ours starts and ends, without torch: one line and an exit code for a mistake."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable

from more_ds import log
from more_ds.errors import PREEMPTED, PreemptedError, TrainingError, UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a user's mistakes: one line, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> int:
    """Run a command: a user's mistake is one line and exit code 2, a run that cannot go on one line and 1.

    A run that was asked to stop, and has saved, ends with `PREEMPTED`.
    """
    try:
        main()
    except UserError as error:
        _say_once(error)
        return 2
    except TrainingError as error:
        _say_once(error)
        return 1
    except PreemptedError as reason:
        log.say(f"stopped ({reason}) and saved; {reason.how}")
        return PREEMPTED
    return 0


def _say_once(error: Exception) -> None:
    """All ranks of a machine meet the same mistake; the first one names it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.fail(str(error))
