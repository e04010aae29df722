"""A queue of jobs as processes: what is done is left out, and the same command goes on after any interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from more_ds import log
from more_ds.engine import cores, free_port
from more_ds.errors import PREEMPTED, PreemptedError, TrainingError
from more_ds.study.jobs import Job

POLL_SECONDS = 0.2


class Process(Protocol):
    """What the queue needs of a process that has been started; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""


Start = Callable[[Job, Path, int], Process]
"""(job, file for its output, slot from 0) -> its process."""


def launcher(slots: int, gpus: int) -> Start:
    """Start jobs as processes of the system.

    Args:
        slots: how many run at once; each has its share of the cores.
        gpus: of each job; slot k has those from k * gpus on. 0: jobs see what this process sees.
    """

    def start(job: Job, output: Path, slot: int) -> Process:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // slots)))
        command = job.command
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(slot * gpus, (slot + 1) * gpus)))
        if gpus > 1:
            # Every job's ranks meet at a port of their own.
            ranks = ["--num_gpus", str(gpus), "--master_port", str(free_port())]
            command = [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, *command[2:]]
        with output.open("a", encoding="utf-8") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)

    return start


def run_all(jobs: Sequence[Job], start: Start, *, slots: int, logs: Path) -> None:
    """Run what is not done yet; a job waits for the one that it starts from.

    Args:
        jobs: in the order in which they may start.
        start: starts one.
        slots: how many run at once.
        logs: folder of their output, a file each, which is continued.

    Raises:
        TrainingError: some have failed; the others were run.
        PreemptedError: this process was asked to stop, or a job was: all have saved what they can.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not job.is_done]
    codes: dict[str, int] = {job.id: 0 for job in jobs if job.is_done}
    running: dict[int, tuple[Job, Process]] = {}
    with log.Progress(len(jobs), "jobs", initial=len(codes)) as bar, _Interruptible() as stop:
        try:
            while waiting or running:
                for job in _ready(waiting, codes):
                    if len(running) == slots:
                        break
                    waiting.remove(job)
                    slot = min(set(range(slots)) - set(running))
                    job.prepare()
                    running[slot] = (job, start(job, _log(logs, job), slot))
                for slot, (job, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[slot]
                        codes[job.id] = code
                        bar.advance(1, job.id)
                        if code == PREEMPTED:
                            raise KeyboardInterrupt
                _fail_followers(waiting, codes)
                time.sleep(POLL_SECONDS if running else 0)
        except KeyboardInterrupt:
            stop.is_stopping = True
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
            for _, process in running.values():
                process.wait()
            raise PreemptedError("asked to", "the same command goes on") from None
    failed = [job for job in jobs if codes[job.id]]
    if failed:
        names = "; ".join(f"{job.arm} ({_log(logs, job)})" for job in failed[:5])
        raise TrainingError(f"{len(failed)} of {len(jobs)} jobs failed: {names}; mend it, and give the command again")


def _ready(waiting: Sequence[Job], codes: dict[str, int]) -> list[Job]:
    return [job for job in waiting if job.source is None or codes.get(job.source.id) == 0]


def _fail_followers(waiting: list[Job], codes: dict[str, int]) -> None:
    """A job whose source has failed fails with it."""
    for job in [job for job in waiting if job.source is not None and codes.get(job.source.id)]:
        waiting.remove(job)
        codes[job.id] = 1


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.id.replace('/', '-')}.log"


class _Interruptible:
    """A context in which SIGTERM and SIGUSR1, by which clusters ask for a stop, do what Ctrl-C does.

    What follows the first means nothing: launchers and `timeout` send one to the process and one to its group.
    """

    def __enter__(self) -> _Interruptible:
        self.is_stopping = False
        self._before = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            raise KeyboardInterrupt
