"""Stopping a run from outside: by a signal, because the launcher is gone, or because its hours are over.

A rank that is asked to stop says so in a reduction that every step does anyway, so all ranks stop after the same step,
save, and exit with `PREEMPTED`. While nothing has been trained yet, a signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import Tensor

from more_ds.engine import Ranks
from more_ds.errors import PREEMPTED, PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_SECONDS = 1.0
"""Signals that follow the first one so closely are its echoes: at a Ctrl-C, terminal and launcher send one each."""
SAVE_SECONDS = 10.0
"""How long a save is taken to last before the first one has been measured."""


class Signals:
    """A context in which `SIGNALS` ask for a stop instead of ending the process.

    They are received by a thread, since the main one may be inside a collective for as long as its time-out: the second
    signal ends the process there and then. A checkpoint is put in place by a rename, so none is harmed.
    """

    def __init__(self) -> None:
        """Nothing is changed before the context is entered."""
        self.received: signal.Signals | None = None
        self.is_training = False
        """Set as soon as there is something to lose: from then on the first signal is a request."""
        self.is_over = False
        """Set when everything is saved: the launcher's signals to the last ranks to exit mean nothing any more."""
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._out, self._in = socket.socketpair()
        self._in.setblocking(False)
        self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
        signal.set_wakeup_fd(self._in.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._restore)  # workers are ended by the signals that they know
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
        self._in.close()

    def _restore(self) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _listen(self) -> None:
        while content := self._out.recv(1):
            if content[0] in SIGNALS and not self.is_over:
                self._receive(signal.Signals(content[0]), time.monotonic())
        self._out.close()

    def _receive(self, number: signal.Signals, now: float) -> None:
        if not self.is_training:
            self._end(f"stopped by {number.name} before training; nothing was lost", PREEMPTED)
        if self.received is None:
            self.received, self._first = number, now
            self._say(f"{number.name}: stops after this step and saves; a second signal stops at once")
        elif now - self._first > ECHO_SECONDS:
            self._end(f"stopped by a second signal, {number.name}; the last checkpoint is as it was", 128 + number)

    def _end(self, text: str, code: int) -> None:
        self._say(text)
        os._exit(code)

    def _say(self, text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(text, file=sys.stderr, flush=True)


class Stop:
    """Whether this run is to stop, and whether all ranks know it."""

    def __init__(self, signals: Signals, ranks: Ranks, max_hours: float | None = None) -> None:
        """Watch signals, launchers and the clock, which began with the process.

        Args:
            signals: an entered context.
            ranks: who has to agree.
            max_hours: when the run must have saved and ended; None: never.
        """
        self.signals, self.ranks = signals, ranks
        self._deadline = None if max_hours is None else psutil.Process().create_time() + 3600 * max_hours
        self._launchers = _launchers()
        self._step_seconds, self._save_seconds = 0.0, SAVE_SECONDS
        self._last_step: float | None = None
        self._heard: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self.signals.received is not None:
            return self.signals.received.name
        if any(not _is_alive(process) for process in self._launchers):
            return "the launcher is gone"
        if self._deadline is not None and time.time() + self._margin() > self._deadline:
            return "max_hours"
        return None

    def hear(self, asked: Tensor) -> None:
        """Take a step's sum of `reason() is not None` over all ranks. Read by `agreed`.

        On a GPU the copy to the host runs beside the step, so that reading it waits for the beginning of the step only.
        """
        self._heard = asked.to("cpu", non_blocking=True)
        if asked.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def agreed(self) -> bool:
        """Whether any rank wanted to stop when the step began: the same on all ranks. Call once a step."""
        now = time.monotonic()
        if self._last_step is not None:
            self._step_seconds = max(self._step_seconds, now - self._last_step)
        self._last_step = now
        if self._copied is not None:
            self._copied.synchronize()
        return self._heard is not None and self._heard.item() > 0

    def check(self) -> None:
        """Raise on all ranks together if one of them wants to stop. Collective.

        Raises:
            PreemptedError: so it is.
        """
        if float(self.ranks.sum(torch.tensor(float(self.reason() is not None)))):
            raise self.error()
        self.no_step()

    def error(self) -> PreemptedError:
        """What ends the run."""
        return PreemptedError(self.reason() or "another rank")

    def no_step(self) -> None:
        """Note that what has passed since the last step, an evaluation or a save, is not the time of one."""
        self._last_step = None

    def saved(self, seconds: float) -> None:
        """Note how long it took until a checkpoint was on the disk."""
        self._save_seconds = max(self._save_seconds if self._save_seconds != SAVE_SECONDS else 0.0, seconds)
        self.no_step()

    def _margin(self) -> float:
        """Seconds that the rest of a step, one more and a save may take, with as much again to spare."""
        return 2 * (2 * self._step_seconds + self._save_seconds)


def _launchers() -> list[psutil.Process]:
    """The processes of the `deepspeed` launcher above this one: it has two, and neither outlives a signal.

    Killed by one, the outer leaves the ranks behind, training on without anybody to end them.
    """
    try:
        above = psutil.Process().parents()[:2]
        return [process for process in above if _is_launcher(process.cmdline())]
    except psutil.Error:
        return []


def _is_launcher(command: list[str]) -> bool:
    return any(Path(part).name == "deepspeed" or part.startswith("deepspeed.launcher") for part in command[:4])


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler that leaves all to the thread; without one the default would end the process."""
