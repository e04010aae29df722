"""Signals to the real `deepspeed` launcher and to what it has started: what is saved, and which exit code comes out.

    make test-launcher     some minutes

`deepspeed` starts `deepspeed.launcher.launch`, and that one the ranks (deepspeed 0.19.8). The outer one dies of any
signal and passes none on. The inner one passes SIGTERM and SIGINT on, and kills the ranks 30 s later; of SIGUSR1 it
dies, and they have all the time that they need.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_runs import argv, make_place, outcome
from fault_runs import start as start_forks

from more_ds.errors import PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--save_steps", "none", "--eval_steps", "7")
"""One save, at the end, unless a signal asks for it."""
PACED = """
import sys, time
sys.path.insert(0, {root!r})
from launch import train
take = train.take_step
def take_step(run, ledger):
    norm = take(run, ledger)
    time.sleep({slow} if run.progress.step == 3 else {seconds})
    return norm
train.take_step = take_step
if __name__ == "__main__":
    sys.exit(train.main())
"""
"""The training command with steps that take their time: the fourth one longest."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    assert start_forks(argv(place, place / "whole", *FLAGS), place / "whole.log").wait() == [0, 0]
    return outcome(place / "whole")


class Launched:
    """A run under the real launcher, in a process group of its own."""

    def __init__(self, place: Path, output: Path, *, slow: float = 0.5, seconds: float = 0.5) -> None:
        self.output, self.log = output, Path(f"{output}.log")
        script = output.with_suffix(".py")
        script.write_text(PACED.format(root=str(ROOT), slow=slow, seconds=seconds))
        command = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", "2", str(script)]
        with self.log.open("ab") as log:
            self.outer = subprocess.Popen(
                [*command, *argv(place, output, *FLAGS)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_step(self, step: int) -> None:
        """Wait until a step has been logged."""
        metrics, deadline = self.output / "metrics.jsonl", time.monotonic() + 180
        while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        [self.inner] = psutil.Process(self.outer.pid).children()
        self.ranks = self.inner.children()
        assert len(self.ranks) == 2

    def signal(self, whom: str, number: int) -> None:
        """Send a signal to the outer or the inner launcher, to the second rank, or to the whole process group."""
        if whom == "group":
            os.killpg(self.outer.pid, number)
        else:
            os.kill({"outer": self.outer.pid, "inner": self.inner.pid, "rank": self.ranks[1].pid}[whom], number)

    def wait(self) -> int:
        """Wait for all processes; returns the exit code of the outer launcher."""
        code = self.outer.wait(180)
        _, alive = psutil.wait_procs([self.inner, *self.ranks], 180)
        assert not alive, self.log.read_text()[-3000:]
        return code


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (output / "checkpoints").glob("step-*"))


def resumed(place: Path, output: Path) -> dict[str, Any]:
    assert start_forks(argv(place, output, *FLAGS), output.with_suffix(".again")).wait() == [0, 0]
    return outcome(output)


@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        ("rank", signal.SIGTERM, PREEMPTED),
        ("rank", signal.SIGUSR1, PREEMPTED),
        ("outer", signal.SIGTERM, -signal.SIGTERM),
        ("outer", signal.SIGKILL, -signal.SIGKILL),
        ("inner", signal.SIGTERM, 1),
        ("inner", signal.SIGKILL, 0),
        ("group", signal.SIGTERM, -signal.SIGTERM),
        ("group", signal.SIGINT, None),
        ("group", signal.SIGUSR1, -signal.SIGUSR1),
    ],
)
def test_a_signal_to_any_of_them_saves_the_run(
    place: Path, whole: dict[str, Any], whom: str, number: int, code: int | None, tmp_path: Path
) -> None:
    job = Launched(place, tmp_path / "run")
    job.wait_for_step(2)
    job.signal(whom, number)
    found = job.wait()
    print(f"{signal.Signals(number).name} to {whom}: exit code {found}, saved after step {steps_in(job.output)}")
    assert code is None or found == code, job.log.read_text()[-3000:]
    [step] = steps_in(job.output)
    assert 2 < step < 7
    assert resumed(place, job.output) == whole


@pytest.mark.parametrize(("number", "saved"), [(signal.SIGUSR1, [5]), (signal.SIGTERM, [])])
def test_the_launcher_gives_a_long_step_thirty_seconds_unless_it_is_gone(
    place: Path, whole: dict[str, Any], number: int, saved: list[int], tmp_path: Path
) -> None:
    """The fourth step takes 36 s: SIGTERM to the whole group loses what is not saved, SIGUSR1 does not.

    Ranks tell each other of a signal when a step begins, so one that comes later is heeded after the step that follows.
    """
    job = Launched(place, tmp_path / "run", slow=36)
    job.wait_for_step(3)
    time.sleep(1)
    job.signal("group", number)
    job.wait()
    assert steps_in(job.output) == saved, job.log.read_text()[-3000:]
    assert resumed(place, job.output) == whole
