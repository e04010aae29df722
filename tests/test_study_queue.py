"""The queue of a study: order, slots, sources, failures and stops."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from more_ds.errors import PreemptedError, TrainingError
from more_ds.study.jobs import Job
from more_ds.study.queue import run_all


class Fake:
    """A process that ends when it is asked for the second time; `code` in place of an end: it never does."""

    def __init__(self, code: int | None) -> None:
        self.code, self.asked, self.signals = code, 0, []  # type: ignore[var-annotated]

    def poll(self) -> int | None:
        self.asked += 1
        return self.code if self.asked > 1 else None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self) -> int:
        if self.signals:
            signal.raise_signal(signal.SIGTERM)  # `timeout` sends a second one, to the group
        return 75


class Machine:
    """Starts fakes, and notes in which order, in which slot, and how many at once."""

    def __init__(self, codes: Mapping[str, int | None] | None = None) -> None:
        self.codes, self.started, self.slots, self.live, self.most = codes or {}, [], [], [], 0  # type: ignore[var-annotated]

    def __call__(self, job: Job, output: Path, slot: int) -> Fake:
        assert not job.is_done
        self.started.append(job.id)
        self.slots.append(slot)
        self.live = [fake for fake in self.live if fake.asked < 2]
        self.live.append(Fake(self.codes.get(job.id, 0)))
        self.most = max(self.most, len(self.live))
        return self.live[-1]


def simple(name: str, folder: Path, source: Job | None = None) -> Job:
    return Job(name, name, "b", 0, "eval/run.py", (), folder / name, source=source)


def test_the_queue_fills_its_slots_and_keeps_the_order(tmp_path: Path) -> None:
    jobs = [simple(name, tmp_path) for name in "abcde"]
    machine = Machine()
    run_all(jobs, machine, slots=2, logs=tmp_path / "logs")
    assert machine.started == list("abcde")
    assert machine.most == 2
    assert set(machine.slots) == {0, 1}


def test_a_job_waits_for_its_source_and_fails_with_it(tmp_path: Path) -> None:
    good, bad = simple("good", tmp_path), simple("bad", tmp_path)
    jobs = [good, bad, simple("after good", tmp_path, good), simple("after bad", tmp_path, bad)]
    machine = Machine({"bad": 1})
    with pytest.raises(TrainingError, match=r"2 of 4 jobs failed: bad \(.*bad.log\); after bad"):
        run_all(jobs, machine, slots=4, logs=tmp_path / "logs")
    assert machine.started == ["good", "bad", "after good"]


@pytest.mark.parametrize("how", ["signal", "a job was stopped"])
def test_a_stop_reaches_all_jobs(tmp_path: Path, how: str) -> None:
    jobs = [simple(name, tmp_path) for name in "abc"]
    machine = Machine({"a": None, "b": 75 if how != "signal" else None})
    if how == "signal":
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(PreemptedError):
        run_all(jobs, machine, slots=2, logs=tmp_path / "logs")
    if how == "signal":
        signal.signal(signal.SIGALRM, before)
    assert machine.started == ["a", "b"]
    assert machine.live[0].signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
