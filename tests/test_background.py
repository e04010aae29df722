"""Work beside the training: what every rank hears of it, and when (5 s)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from distributed import run_ranks

from more_ds.background import Background
from more_ds.engine import Ranks
from more_ds.errors import TrainingError, UserError


def results(ranks: Ranks, folder: Path) -> tuple[list[object], list[str], bool]:
    background, released = Background(ranks.device), threading.Event()
    here = threading.get_ident()
    elsewhere: list[bool] = []

    def work() -> dict[str, float]:
        elsewhere.append(threading.get_ident() != here)
        released.wait(30)
        (folder / f"{ranks.rank}").touch()
        return {"seconds": 1.5}

    found: list[object] = [background.wait()]
    background.start(work, "nothing")
    ranks.barrier()  # the ranks go on while the work has not ended
    before = [path.name for path in folder.iterdir()]
    ranks.barrier()  # and all have looked before it does
    with pytest.raises(RuntimeError, match="one piece of work at a time"):
        background.start(work, "nothing")
    released.set()
    found += [background.wait(), background.wait()]
    return found, before, elsewhere == [True] * (ranks.rank == 0)


def test_the_result_is_every_ranks_and_the_work_one_threads_of_rank_zero(tmp_path: Path) -> None:
    assert run_ranks(results, 2, tmp_path) == [([None, {"seconds": 1.5}, None], [], True)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def failures(ranks: Ranks) -> list[str]:
    background, messages = Background(ranks.device), []

    def fail(error: Exception) -> None:
        raise error

    for error, expected in ((OSError(28, "No space left"), TrainingError), (UserError("a mistake"), UserError)):
        background.start(lambda error=error: fail(error), "the checkpoint x was not written")
        with pytest.raises(expected) as caught:
            background.wait()
        messages.append(str(caught.value))
    background.start(lambda: fail(OSError(5, "I/O error")), "the checkpoint y was not written")
    background.settle()
    background.settle()
    return [*messages, str(background.wait())]


def test_an_error_is_every_ranks_and_a_warning_where_nobody_waits(capfd: pytest.CaptureFixture[str]) -> None:
    expected = ["the checkpoint x was not written: [Errno 28] No space left", "a mistake", "None"]
    assert run_ranks(failures, 2) == [expected] * 2
    assert capfd.readouterr().out == "warning: the checkpoint y was not written: [Errno 5] I/O error\n"
