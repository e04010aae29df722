"""Runs that are asked to stop: all ranks stop together, have saved, and go on to the same bytes (25 s)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fault_runs import STEPS, argv, make_place, outcome, start

from launch import train
from more_ds import run as run_module
from more_ds import stopping, text_model
from more_ds.errors import PREEMPTED
from more_ds.ledger import Ledger
from more_ds.run import Run
from more_ds.stopping import Signals, Stop


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """A run that nobody stops."""
    assert start(argv(place, place / "whole"), place / "whole.log").wait() == [0, 0]
    return outcome(place / "whole")


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (output / "checkpoints").glob("step-*"))


def at_call(owner: Any, name: str, call: int, rank_to_signal: int, number: int) -> Any:
    """A patch that sends a signal to one rank, from itself, in the `call`-th call of a function."""

    def patch(rank: int) -> None:
        original, count = getattr(owner, name), [0]

        def wrapped(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == call and rank == rank_to_signal:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # until the thread has seen it
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    return patch


@pytest.mark.parametrize(
    ("where", "number", "stops_at"),
    [
        ((train, "take_step", 3, 1), signal.SIGTERM, 3),
        ((run_module, "evaluate", 1, 1), signal.SIGINT, 3),
        pytest.param((train, "take_step", 2, 0), signal.SIGUSR1, 2, marks=pytest.mark.slow),
        pytest.param((run_module.checkpoint, "take", 4, 1), signal.SIGTERM, 5, marks=pytest.mark.slow),
    ],
    ids=["in a step", "in an evaluation", "in a step of rank 0", "in a save"],
)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    place: Path, whole: dict[str, Any], where: Any, number: int, stops_at: int, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    assert start(argv(place, output), log, patch=at_call(*where, number)).wait() == [PREEMPTED, PREEMPTED]
    assert "and saved; go on with --resume auto" in log.read_text()
    assert steps_in(output)[-1] == stops_at
    assert start(argv(place, output), log).wait() == [0, 0]
    assert outcome(output) == whole


def test_a_signal_while_loading_ends_the_process_at_once(place: Path, tmp_path: Path) -> None:
    patch = at_call(train, "load_base", 1, 0, signal.SIGTERM)
    job = start(argv(place, tmp_path / "run"), tmp_path / "log", patch=patch)
    assert PREEMPTED in job.wait()
    assert "stopped by SIGTERM before training" in job.log.read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_a_process_that_hangs(place: Path, tmp_path: Path) -> None:
    """Rank 0 hangs in a collective, in C++, because rank 1 sleeps; no Python handler would ever run there."""

    def patch(rank: int) -> None:
        at_call(train, "take_step", 3, 0, signal.SIGTERM)(rank)
        original, calls = train.take_step, [0]

        def sleepy(run: Run, ledger: Ledger) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == 3:
                time.sleep(30)
            return original(run, ledger)

        train.take_step = sleepy

    job = start(argv(place, tmp_path / "run"), tmp_path / "log", patch=patch)
    job.wait_for("a second signal stops at once")
    time.sleep(stopping.ECHO_SECONDS + 0.2)
    job.signal(signal.SIGTERM, [0])
    job.ranks[0].join(5)
    assert job.ranks[0].exitcode == 128 + signal.SIGTERM
    job.wait()
    assert steps_in(tmp_path / "run") == [1, 2]


def test_max_hours_saves_and_stops(place: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    job = start(argv(place, tmp_path / "run", "--max_hours", "0.0001"), tmp_path / "log")
    assert job.wait() == [PREEMPTED, PREEMPTED]
    assert "stopped (max_hours)" in job.log.read_text()
    assert steps_in(tmp_path / "run") == [1]
    assert start(argv(place, tmp_path / "run", "--max_hours", "10"), tmp_path / "log").wait() == [0, 0]
    assert outcome(tmp_path / "run") == whole


def test_the_margin_of_max_hours_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the longest step is 7 s, the longest save 20 s; two steps and a save, twice, are 68 s."""
    clock, born = [0.0], psutil.Process().create_time()
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping.time, "time", lambda: born + clock[0])
    stop = Stop(Signals(), SimpleNamespace(), max_hours=1.0)  # type: ignore[arg-type]
    for now in (0.0, 5.0, 12.0):
        clock[0] = now
        stop.agreed()
    stop.saved(20.0)
    clock[0] = 500.0
    stop.agreed()  # after a save: what has passed since the step before is not a step's
    stop.saved(3.0)
    for now, reason in ((3600 - 68.5, None), (3600 - 67.5, "max_hours")):
        clock[0] = now
        assert stop.reason() == reason


def test_ranks_whose_launcher_is_killed_do_not_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "print(flush=True); input()", "deepspeed.launcher.launch"]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # before it is what it will be, it has no command line
    process = psutil.Process(child.pid)
    assert stopping._is_launcher(process.cmdline())
    assert stopping._is_launcher(["/venv/bin/python", "/venv/bin/deepspeed", "launch/train.py"])
    assert not stopping._is_launcher(["/bin/bash", "-c", "python launch/train.py"])
    monkeypatch.setattr(stopping, "_launchers", lambda: [process])
    stop = Stop(Signals(), SimpleNamespace())  # type: ignore[arg-type]
    assert stop.reason() is None
    child.kill()
    deadline = time.monotonic() + 10
    while stop.reason() is None and time.monotonic() < deadline:  # not reaped: it is a zombie
        time.sleep(0.01)
    assert stop.reason() == "the launcher is gone"
    child.wait()
    assert stop.reason() == "the launcher is gone"


def test_signals_are_as_before_outside_and_in_forks() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with Signals():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
        child = os.fork()
        if child == 0:
            os._exit([signal.getsignal(number) for number in stopping.SIGNALS] != before)
        assert os.waitpid(child, 0)[1] == 0
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def poison(step: int, what: str) -> Any:
    """A patch that makes the loss, or the gradient alone, of rank 1 not finite at a step (counted from 1)."""

    def patch(rank: int) -> None:
        original = text_model.label_nll

        def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> Any:
            nll, other = original(logits, labels)
            if rank == 1 and poisoned.step == step:  # type: ignore[attr-defined]
                nll = nll * float("nan") if what == "loss" else nll + (logits * 0).abs().sqrt().sum()
            return nll, other

        take = train.take_step

        def counted(run: Run, ledger: Ledger) -> Any:
            poisoned.step = run.progress.step + 1  # type: ignore[attr-defined]
            return take(run, ledger)

        text_model.label_nll, train.take_step = poisoned, counted

    return patch


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_named_and_the_last_good_state_kept(place: Path, what: str, tmp_path: Path) -> None:
    job = start(argv(place, tmp_path / "run"), tmp_path / "log", patch=poison(3, what))
    assert job.wait() == [1, 1]
    [line] = [line for line in job.log.read_text().splitlines() if line.startswith("error")]
    where = r"task '\w+', rank 1" if what == "loss" else r"of tasks (copy|parity|copy, parity)"
    assert re.match(rf"error: the {what} is not finite at step 3, {where}; the last checkpoint is as it was", line)
    assert steps_in(tmp_path / "run") == [1, 2]


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(place: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    extra = ("--skip_nonfinite", "1", "--save_steps", "none", "--logging_steps", "2")
    assert start(argv(place, output, *extra), log, patch=poison(3, "loss")).wait() == [0, 0]
    assert "left out: the loss is not finite at step 3" in log.read_text()
    rows = outcome(output)["losses"]
    assert [row[0] for row in rows] == [2, 3, 4, 6, 7]
    assert steps_in(output)[-1] == STEPS
    job = start(argv(place, tmp_path / "again", "--skip_nonfinite", "0"), log, patch=poison(3, "loss"))
    assert job.wait() == [1, 1]
