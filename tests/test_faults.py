"""Faults while a run writes or reads its checkpoints (30 s); `make test-faults` has the kills at random moments."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import STEPS, argv, make_place, outcome, start

from more_ds import run as run_module
from more_ds import snapshot
from more_ds.checkpoint_files import (
    ADAPTER,
    FILES,
    MANIFEST,
    OPTIMIZER,
    STATE,
    complete,
    name_of,
    read_folder,
    write_folder,
)
from more_ds.errors import PREEMPTED
from more_ds.run import Run

CALLS_PER_SAVE = 17
"""Flushes and renames of one checkpoint: five files with three each, the folder's rename and its flush."""
PUBLISHED_CALLS = 2
"""Renames that put its adapter in the place of `last`."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    assert start(argv(place, place / "whole"), place / "whole.log").wait() == [0, 0]
    return outcome(place / "whole")


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A run that was stopped after two steps, with both checkpoints."""
    output = place / "stopped"
    assert start(argv(place, output), place / "log", patch=stop_at_two).wait() == [PREEMPTED, PREEMPTED]
    assert len(complete(output / "checkpoints")) == 2
    return output


def stop_at_two(rank: int) -> None:
    """A patch: a signal between the first step and its save is heard of in the second step."""
    original = Run.save

    def save(run: Run) -> None:
        if run.progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run)

    Run.save = save


def fail_at(call: int, fault: str, step: int = 2, until: str = "") -> Any:
    """A patch that makes the `call`-th flush or rename of the checkpoint of `step` fail, or kills rank 0 there.

    It is written only when the log of the run has come as far as `until`.
    """

    def patch(rank: int) -> None:
        write, count = snapshot.write_folder, [0]

        def wrap(function: Any) -> Any:
            def wrapped(*arguments: Any) -> Any:
                count[0] += 1
                if count[0] == call and fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if count[0] == call:
                    number = getattr(errno, fault)
                    raise OSError(number, os.strerror(number))
                return function(*arguments)

            return wrapped

        def writing(folder: Path, *arguments: Any) -> None:
            if folder.name == name_of(step):
                metrics, deadline = folder.parents[1] / "metrics.jsonl", time.monotonic() + 30
                while until not in metrics.read_text() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)
            write(folder, *arguments)

        snapshot.write_folder = writing

    return patch


def points() -> list[Any]:
    """Every call of the second save with every fault; a few of them are fast tests."""
    fast = {(2, "ENOSPC"), (CALLS_PER_SAVE - 1, "kill")}
    return [
        pytest.param(call, fault, marks=[] if (call, fault) in fast else pytest.mark.slow)
        for call in range(1, CALLS_PER_SAVE + PUBLISHED_CALLS + 1)
        for fault in ("ENOSPC", "EIO", "kill")
    ]


@pytest.mark.parametrize(("call", "fault"), points())
def test_a_fault_in_a_save_costs_one_interval(
    place: Path, whole: dict[str, Any], call: int, fault: str, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    codes = start(argv(place, output), log, patch=fail_at(call, fault)).wait()
    assert codes == ([1, 1] if fault != "kill" else [-signal.SIGKILL, codes[1]])
    if fault != "kill":
        assert os.strerror(getattr(errno, fault)) in log.read_text()
    found = complete(output / "checkpoints")
    assert found
    for path in found:
        read_folder(path)
    assert start(argv(place, output), log).wait() == [0, 0]
    assert outcome(output) == whole


@pytest.mark.parametrize("fault_at", [1, pytest.param(9, marks=pytest.mark.slow), CALLS_PER_SAVE - 1])
def test_training_goes_on_beside_a_save_and_a_kill_costs_that_one_alone(
    place: Path, whole: dict[str, Any], fault_at: int, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = argv(place, output, "--save_steps", "2")
    job = start(arguments, log, patch=fail_at(fault_at, "kill", step=4, until='"step": 6'))
    assert job.wait()[0] == -signal.SIGKILL
    assert [path.name for path in complete(output / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert start(arguments, log).wait() == [0, 0]
    assert "step-00000003, step 3" in log.read_text()
    assert outcome(output) == whole


def test_a_kill_between_a_checkpoint_and_its_copies_is_mended(
    place: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """The last checkpoint is there, so that no step is taken and none written any more."""
    output, log = tmp_path / "run", tmp_path / "log"

    def patch(rank: int) -> None:
        publish = run_module.publish

        def killed(path: Path, *arguments: Any) -> None:
            if path.name == f"step-{STEPS:08d}":
                os.kill(os.getpid(), signal.SIGKILL)
            publish(path, *arguments)

        run_module.publish = killed

    assert start(argv(place, output), log, patch=patch).wait()[0] == -signal.SIGKILL
    assert start(argv(place, output), log).wait() == [0, 0]
    assert f"step-{STEPS:08d}, step {STEPS}" in log.read_text()
    assert outcome(output) == whole


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        ADAPTER,
        pytest.param(STATE, marks=pytest.mark.slow),
        pytest.param(OPTIMIZER, marks=pytest.mark.slow),
        pytest.param(MANIFEST, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    place: Path, whole: dict[str, Any], stopped: Path, name: str, fault: str, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, output)
    path = output / "checkpoints" / "step-00000002" / name
    damage(path, fault)
    job = start([*argv(place, output), "--resume", str(path.parent)], log)
    assert set(job.wait()) == {2}
    assert "is no complete checkpoint" in log.read_text() or f"{name} differs from its sha256" in log.read_text()
    assert start(argv(place, output), log).wait() == [0, 0]
    assert "step-00000001, step 1" in log.read_text()
    assert outcome(output) == whole


def damage(path: Path, fault: str) -> None:
    content = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_run_whose_checkpoints_are_all_damaged_says_so(place: Path, stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    for path in complete(output / "checkpoints"):
        damage(path / ADAPTER, "flipped")
    job = start(argv(place, output), tmp_path / "log")
    assert job.wait() == [2, 2]
    assert "no checkpoint in" in job.log.read_text()
    assert job.log.read_text().count(f"{ADAPTER} differs from its sha256") == 2


def test_the_calls_of_a_save_are_as_many_as_the_faults(tmp_path: Path) -> None:
    count = [0]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            function = getattr(os, name)

            def counted(*arguments: Any, function: Any = function) -> Any:
                count[0] += 1
                return function(*arguments)

            patch.setattr(os, name, counted)
        write_folder(tmp_path / "step-00000001", dict.fromkeys(FILES, b"{}"))
    assert count == [CALLS_PER_SAVE]
