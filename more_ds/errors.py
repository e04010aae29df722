"""Errors that are the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input: one readable line, exit code 2, before anything expensive starts.

    The message says what was wrong, what was found, and what to do.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" or "; known: a, b, c" for an unknown `name`."""
    names = sorted({str(item) for item in known})
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


class TrainingError(Exception):
    """A run that cannot go on (a loss that is not finite, say): one line, exit code 1, what was saved stays."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not finite.

    Attributes:
        step: the optimizer step it was met at, counted from 0.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


PREEMPTED = 75
"""Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


class PreemptedError(Exception):
    """A run that was asked to stop, on all ranks after the same step; exit code `PREEMPTED`. Says by what.

    Attributes:
        how: what to do to go on.
    """

    def __init__(self, reason: str, how: str = "go on with --resume auto") -> None:
        super().__init__(reason)
        self.how = how
