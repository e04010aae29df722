"""Work on rank 0 that goes on beside the training, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from more_ds import log
from more_ds.collective import on_rank_zero


class Background:
    """A thread of rank 0. All ranks call `start` and `wait` together; the thread itself speaks to no other rank."""

    def __init__(self, device: torch.device) -> None:
        """Start no thread yet.

        Args:
            device: where the ranks' collectives run.
        """
        self._device = device
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._failure: str | None = None
        self._work: Future[Any] | None = None

    def start(self, work: Callable[[], Any], failure: str) -> None:
        """Begin `work` on rank 0. Collective.

        Args:
            work: touches nothing that training changes; returns plain JSON.
            failure: what an error in it means; begins the message.

        Raises:
            RuntimeError: what was started before has not been waited for.
        """
        if self._failure is not None:
            raise RuntimeError("one piece of work at a time: wait() for the one before")
        self._failure = failure
        if dist.get_rank() == 0:
            self._work = self._threads.submit(work)

    def wait(self) -> Any:
        """Wait for the end of what was started, and return its result on every rank; None if there is none. Collective.

        Raises:
            UserError, TrainingError: on every rank, as for `on_rank_zero`.
        """
        if self._failure is None:
            return None
        failure, work = self._failure, self._work
        self._failure = self._work = None
        return on_rank_zero(lambda: work.result() if work else None, self._device, failure)

    def settle(self) -> None:
        """Let what was started end although the ranks may have lost each other; an error in it is a warning."""
        error = self._work.exception() if self._work is not None else None
        if error is not None:
            log.say(f"warning: {self._failure}: {error}")
        self._failure = self._work = None
