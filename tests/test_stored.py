"""Training examples on the disk: those that a list has, made once, found again by what they are made of."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from more_ds.data import stored
from more_ds.data.rows import load_examples
from more_ds.data.sources import FileSplit
from more_ds.data.stored import StoredExamples, digest_examples, stored_examples
from more_ds.errors import UserError
from more_ds.tasks import resolve_tasks
from more_ds.tasks.render import expand
from more_ds.tasks.schema import Task

SUITE = """
tasks:
  closed: {prompt: "{text}", label: label, labels: {0: "no", 1: "yes"}, metrics: [accuracy], split: {carve_train: 9}}
  scale: {prompt: "{text}", label: score, labels: {range: [0, 5, 0.2]}, metrics: [pearson], plain_prompt: "x {text}"}
  choice: {prompt: "{text}", options: words, metrics: [accuracy]}
  free: {prompt: "{text}", references: words, metrics: [bleu], split: {carve_train: 9}}
  grouped: {prompt: "{kind}", references: text, group: kind, metrics: [bleu], split: {carve_train: 2}}
"""
NAMES = ["closed", "scale", "choice", "free", "grouped"]


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "text": f"té\nxt {i}", "label": i % 2, "score": i % 6 * 0.8, "kind": f"kind {i % 7}",
            "words": [f"w{i}-{j}" for j in range(2 + i % 3)],
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    (tmp_path / "own.yaml").write_text(SUITE)
    for name in NAMES:
        write(tmp_path, name, rows())
    return {task.name: task for task in resolve_tasks(tasks_file=tmp_path / "own.yaml")}


def write(place: Path, name: str, found: list[dict[str, Any]]) -> Path:
    path = place / "own" / name / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def store(task: Task, place: Path, **options: Any) -> StoredExamples:
    return stored_examples(task, data_dir=place, cache_dir=place / "cache", **options)


def folders(place: Path) -> list[Path]:
    return [path for path in (place / "cache/examples").iterdir() if path.is_dir() and path.suffix != ".building"]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_those_of_a_list(name: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    wanted = expand(load_examples(tasks[name], "train", data_dir=tmp_path))
    found = store(tasks[name], tmp_path)
    assert list(found) == wanted
    assert [type(example.gold) for example in found] == [type(example.gold) for example in wanted]
    assert len(found) == len(wanted)
    assert (found[0], found[-1], found[1:9:3]) == (wanted[0], wanted[-1], wanted[1:9:3])
    with pytest.raises(IndexError):
        found[len(wanted)]
    assert found.longest_target == max(len(e.target.encode()) for e in wanted)


def test_a_plain_prompt_has_examples_of_its_own(tasks: dict[str, Task], tmp_path: Path) -> None:
    plain = store(tasks["scale"], tmp_path, plain=True)
    assert plain[3].prompt == "x té\nxt 3"
    assert store(tasks["scale"], tmp_path)[3].prompt == "té\nxt 3"


def test_they_are_made_once(tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(store(tasks["free"], tmp_path))
    monkeypatch.setattr(stored, "_write", None)
    monkeypatch.setattr(FileSplit, "rows", None)
    assert list(store(tasks["free"], tmp_path)) == first


@pytest.mark.parametrize("part", ["one text", "the order", "the task", "the code"])
def test_another_part_makes_other_examples(
    part: str, tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, before = tasks["closed"], store(tasks["closed"], tmp_path)
    found = rows()
    if part == "one text":
        found[3]["text"] = "other"
    elif part == "the order":
        found.reverse()
    elif part == "the task":
        (tmp_path / "own.yaml").write_text(SUITE.replace('"yes"', '"yep"'))
        task = resolve_tasks(tasks_file=tmp_path / "own.yaml")[0]
    else:
        monkeypatch.setattr(stored, "digest_sources", lambda folder: "other code")
    write(tmp_path, "closed", found)
    after = store(task, tmp_path)
    assert len(folders(tmp_path)) == 2
    assert list(after) == expand(load_examples(task, "train", data_dir=tmp_path))
    assert (digest_examples(after) == digest_examples(before)) == (part == "the code")


def test_the_same_examples_have_the_same_digest_as_a_list(tasks: dict[str, Task], tmp_path: Path) -> None:
    found = store(tasks["choice"], tmp_path)
    assert digest_examples(found) == digest_examples(list(found)) != digest_examples(list(found)[1:])


def test_a_carved_part_has_a_digest_of_its_own(tasks: dict[str, Task], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(SUITE.replace("carve_train: 9", "carve_train: 8"))
    other = resolve_tasks(tasks_file=tmp_path / "own.yaml")[0]
    assert digest_examples(store(other, tmp_path)) != digest_examples(store(tasks["closed"], tmp_path))


@pytest.mark.parametrize("name", ["examples.jsonl", "ends.int64", "rows.int64", "about.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_damage_is_named(name: str, damage: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    store(tasks["closed"], tmp_path)
    path = folders(tmp_path)[0] / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 16 * 8])
    with pytest.raises(UserError, match=r"examples of task 'closed' in .* are damaged; delete that folder"):
        store(tasks["closed"], tmp_path)


def test_a_bad_row_is_named_and_leaves_nothing(tasks: dict[str, Task], tmp_path: Path) -> None:
    found = rows()
    found[7]["label"] = 5
    write(tmp_path, "closed", found)
    with pytest.raises(UserError, match=r"split 'train': task 'closed', row 7: label 5 .* is outside the set"):
        store(tasks["closed"], tmp_path)
    assert not folders(tmp_path)
    write(tmp_path, "closed", [])
    with pytest.raises(UserError, match="split 'train' has no rows"):
        store(tasks["closed"], tmp_path)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a tenth of what the texts alone would need."""
    count, text = 3_000, "word " * 1_000

    def many(split: FileSplit) -> Iterator[dict[str, Any]]:
        return ({"text": text, "label": i % 2} for i in range(count))

    (tmp_path / "own.yaml").write_text(SUITE.replace(", split: {carve_train: 9}", ""))
    task = resolve_tasks(tasks_file=tmp_path / "own.yaml")[0]
    write(tmp_path, "closed", rows())
    monkeypatch.setattr(FileSplit, "rows", many)
    monkeypatch.setattr(FileSplit, "count", lambda split: count)
    tracemalloc.start()
    try:
        found = store(task, tmp_path)
        assert sum(example.gold for example in found if isinstance(example.gold, int)) == count // 2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < count * len(text) / 10
