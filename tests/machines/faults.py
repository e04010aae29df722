"""Kill training at random moments, resume it, and compare the end with that of runs that nobody touched.

    make test-faults                        200 kills: four ZeRO stages, two number formats
    MORE_DS_KILLS=20 make test-faults       fewer

Accumulation and dropout are on. A kill takes one rank or all of them, by SIGKILL, by SIGTERM, or by SIGKILL shortly
after SIGTERM, so that it hits the save. Moments are spread over the whole life of a process, loading included.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_runs import argv, make_place, outcome, start

from more_ds.checkpoint_files import complete, read_folder
from more_ds.errors import PREEMPTED

KILLS = int(os.environ.get("MORE_DS_KILLS", "200"))
SETUPS = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))
KINDS = ("kill one", "kill all", "terminate one", "terminate all", "kill in the save")
SEED = int(os.environ.get("MORE_DS_SEED", "0"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("stage", "dtype"), SETUPS)
def test_killed_runs_end_with_the_same_bytes(place: Path, stage: int, dtype: str, tmp_path: Path) -> None:
    number = SETUPS.index((stage, dtype))
    wanted = KILLS // len(SETUPS) + (number < KILLS % len(SETUPS))
    draw, counted = random.Random(SEED * 1000 + number), Counter[str]()

    def arguments(output: Path) -> list[str]:
        return argv(place, output, "--dtype", dtype, stage=stage)

    began = time.monotonic()
    assert start(arguments(tmp_path / "whole"), tmp_path / "log").wait() == [0, 0]
    seconds, whole = time.monotonic() - began, outcome(tmp_path / "whole")
    runs = 0
    while counted.total() < wanted:
        output = tmp_path / f"run-{runs}"
        runs += 1
        while not run_and_kill(arguments(output), tmp_path / "log", draw, seconds, counted, wanted):
            check_checkpoints(output)
        assert outcome(output) == whole, f"run {runs} of {stage=} {dtype=} differs, after {dict(counted)}"
    print(f"zero{stage} {dtype}: {counted.total()} kills {dict(counted)}, {runs} runs, all equal", flush=True)


def run_and_kill(
    arguments: list[str], log: Path, draw: random.Random, seconds: float, counted: Counter[str], wanted: int
) -> bool:
    """Start a run, hit it at a random moment if it gets there, and wait for it; whether it has reached its end."""
    job = start(arguments, log)
    moment, kind, rank = draw.uniform(0.1, 1.0) * seconds, draw.choice(KINDS), draw.randrange(2)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and all(process.is_alive() for process in job.ranks):
        time.sleep(0.005)
    hit = counted.total() < wanted and all(process.is_alive() for process in job.ranks)
    if hit:
        counted[kind] += 1
        strike(job, kind, rank, draw.uniform(0.0, 0.15) * seconds)
    codes = job.wait()
    if codes == [0, 0]:
        return True
    assert hit, f"exit codes {codes} without a kill:\n{log.read_text()[-3000:]}"
    if kind == "terminate all":
        assert set(codes) <= {PREEMPTED, -signal.SIGTERM}, f"{codes}:\n{log.read_text()[-3000:]}"
    return False


def strike(job: Any, kind: str, rank: int, later: float) -> None:
    if kind == "kill in the save":
        job.signal(signal.SIGTERM)
        time.sleep(later)
        job.signal(signal.SIGKILL)
    else:
        number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
        job.signal(number, [rank] if kind.endswith("one") else None)


def check_checkpoints(output: Path) -> None:
    """Whatever calls itself complete is whole."""
    for path in complete(output / "checkpoints"):
        read_folder(path)
