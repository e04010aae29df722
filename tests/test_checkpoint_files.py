"""A checkpoint's folder under faults: it is there whole, or the one before is (5 s)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from more_ds.checkpoint_files import (
    FILES,
    MANIFEST,
    STATE,
    UNFINISHED,
    base_identity,
    complete,
    name_of,
    newest_complete,
    read_folder,
    read_state,
    rotate,
    to_json,
    write_file,
    write_folder,
)
from more_ds.config import RunConfig
from more_ds.errors import UserError
from more_ds.run_folder import RunFolder


def contents(step: int) -> dict[str, bytes]:
    return {name: f"{name} of {step}".encode() for name in FILES} | {STATE: to_json({"run": {"seen": step}})}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, after steps 1 and 2."""
    for step in (1, 2):
        write_folder(tmp_path / name_of(step), contents(step))
    return tmp_path


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, fault: Callable[[], None]) -> list[int]:
    """Run `fault` instead of the `call`-th fsync, write or rename; the returned list counts them."""
    count = [0]

    def wrap(function: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            count[0] += 1
            if count[0] == call:
                fault()
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(os, "fsync", wrap(os.fsync))
    monkeypatch.setattr(os, "replace", wrap(os.replace))
    return count


def no_space() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", [2, 3])
def test_an_io_error_at_any_point_leaves_what_was_there(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first case writes a step for the second time."""
    another = contents(step) | {FILES[0]: b"another"}
    before = {name_of(1): contents(1), name_of(2): contents(2)}
    after = before | {name_of(step): another}
    outcomes, failed = [], True
    while failed:
        folder = tmp_path / str(len(outcomes))
        for old in (1, 2):
            write_folder(folder / name_of(old), contents(old))
        with monkeypatch.context() as patch:
            fail_at(patch, len(outcomes) + 1, no_space)
            try:
                write_folder(folder / name_of(step), another)
                failed = False
            except OSError:
                outcomes.append({path.name: read_folder(path) for path in complete(folder)})
        assert [path.name for path in folder.iterdir() if path.name.startswith(UNFINISHED)] == []
    assert {path.name: read_folder(path) for path in complete(folder)} == after
    # The last fault is that of flushing the parent folder, when the rename has been done.
    assert outcomes == [before] * (len(outcomes) - 1) + [after]
    assert len(outcomes) > 15  # five files with three calls each, and the folder


@pytest.mark.parametrize("step", [2, 3])
def test_a_kill_at_any_point_leaves_a_complete_checkpoint(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first case writes a step for the second time: no moment is without a checkpoint of it."""
    another = contents(step) | {FILES[0]: b"another"}
    call, status = 0, -1
    while not os.WIFEXITED(status):
        call += 1
        child = os.fork()
        if child == 0:
            try:
                fail_at(monkeypatch, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
                write_folder(folder / name_of(step), another)
            finally:
                os._exit(sys.exc_info()[0] is not None)
        _, status = os.waitpid(child, 0)
        newest = newest_complete(folder)
        assert newest is not None
        assert read_folder(newest) in (contents(2), another)
        assert read_folder(folder / name_of(1)) == contents(1)
    assert status == 0
    assert call > 10
    assert newest == folder / name_of(step)
    assert read_folder(newest) == another
    assert sorted(path.name for path in folder.iterdir()) == [name_of(other) for other in range(1, max(2, step) + 1)]


def test_what_the_disk_gives_back_is_checked_before_it_counts(folder: Path) -> None:
    seen = []

    def refuse(written: object) -> None:
        seen.append(written)
        raise UserError("not what it was")

    with pytest.raises(UserError, match="not what it was"):
        write_folder(folder / name_of(3), contents(3), refuse)
    assert seen == [contents(3)]
    assert newest_complete(folder) == folder / name_of(2)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name_of(2) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} differs from its sha256"):
        read_folder(folder / name_of(2))
    assert read_folder(folder / name_of(1)) == contents(1)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(folder: Path, name: str, fault: str) -> None:
    path = folder / name_of(2) / name
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert newest_complete(folder) == folder / name_of(1)
    with pytest.raises(UserError, match=name):
        read_folder(folder / name_of(2))


def test_a_manifest_cannot_name_other_files(folder: Path) -> None:
    path = folder / name_of(2) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["../../secret"] = manifest["files"].pop(STATE)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest"):
        read_folder(folder / name_of(2))
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        read_folder(folder / name_of(2))


def test_the_newest_is_by_number_and_other_names_do_not_count(folder: Path) -> None:
    write_folder(folder / "step-100000000", contents(100000000))
    write_folder(folder / name_of(99999999), contents(99999999))
    shutil.copytree(folder / name_of(1), folder / "step-999999999-copy")
    shutil.copytree(folder / name_of(1), folder / f"{UNFINISHED}{name_of(7)}")
    (folder / "step-00000900").write_text("a file")
    assert newest_complete(folder) == folder / "step-100000000"
    assert read_state(folder / name_of(1)) == {"seen": 1}
    assert newest_complete(folder / "nowhere") is None
    with pytest.raises(UserError, match="no checkpoint at"):
        read_state(folder / "nowhere")


def test_rotation_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_folder(tmp_path / name_of(step), contents(step))
    (tmp_path / name_of(6) / STATE).unlink()  # damaged: does not count as one that is kept
    rotate(tmp_path, keep=2, protect=[Path("elsewhere") / name_of(1)])
    assert [path.name for path in complete(tmp_path)] == [name_of(step) for step in (1, 4, 5)]
    rotate(tmp_path, keep=0)
    assert [path.name for path in complete(tmp_path)] == [name_of(5)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter_model.safetensors"
    write_file(path, b"old")
    for call in (1, 2):
        with monkeypatch.context() as patch:
            fail_at(patch, call, no_space)
            with pytest.raises(OSError, match="No space"):
                write_file(path, b"new")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read().replace(b"w", b"v"))
    with pytest.raises(OSError, match="not what was written"):
        write_file(path, b"new")
    monkeypatch.undo()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    write_file(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_a_number_that_is_not_finite_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"best": float("nan")})


def test_a_base_model_is_known_by_its_bytes(tmp_path: Path) -> None:
    base, moved = tmp_path / "base", tmp_path / "moved"
    base.mkdir()
    (base / "config.json").write_text("{}")
    large = bytearray(os.urandom(100)) * 20_000
    (base / "model.safetensors").write_bytes(large)
    (base / "tokenizer.json").write_text("{}")
    identity = base_identity(str(base))
    shutil.copytree(base, moved)
    (moved / "tokenizer.json").write_text("not part of it")
    assert base_identity(str(moved))["sha256"] == identity["sha256"]
    assert identity["name_or_path"] == str(base)

    for position in (0, len(large) - 1):
        changed = bytearray(large)
        changed[position] ^= 1
        (moved / "model.safetensors").write_bytes(changed)
        assert base_identity(str(moved))["sha256"] != identity["sha256"]
    (moved / "model.safetensors").write_bytes(large)
    (moved / "config.json").write_text("{ }")
    assert base_identity(str(moved))["sha256"] != identity["sha256"]
    (moved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        base_identity(str(moved))


def test_a_kill_while_a_run_folder_is_made_leaves_one_that_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made for the first time, and again by a resume, which writes the same."""
    path, config = tmp_path / "run", RunConfig(train_batch_size=4)
    calls = []
    for _ in ("first", "again"):
        call, status = 0, -1
        while not os.WIFEXITED(status):
            call += 1
            child = os.fork()
            if child == 0:
                fail_at(monkeypatch, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
                RunFolder(path).create(config, {}, {})
                os._exit(0)
            _, status = os.waitpid(child, 0)
            RunFolder(path).check(config, resume=True)
        calls.append(call)
    assert calls == [13, 13], "four files with a flush, a rename and a flush of the folder each; and none that fails"
    assert json.loads((path / "config.json").read_text())["train_batch_size"] == 4
    (path / "config.json").write_text("")
    with pytest.raises(UserError, match="is not JSON"):
        RunFolder(path).check(config, resume=True)


def test_a_resumed_run_writes_no_row_twice(tmp_path: Path) -> None:
    """A kill between an evaluation and its save: the row is there, and the checkpoint knows nothing of it."""
    rows = [
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 1.0},
        {"step": 3, "mean_score": 5.0},
        {"step": 4, "loss": 0.5},
    ]
    lines = [json.dumps(row) for row in rows]
    folder = RunFolder(tmp_path)
    for is_evaluated, kept in ((True, lines[:3]), (False, lines[:2])):
        folder.metrics.write_text("\n".join([*lines, '{"step": 4, "tasks": {"a": {}']))
        folder.forget_after(3, is_evaluated)
        assert folder.metrics.read_text().splitlines() == kept
