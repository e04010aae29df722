"""Reading data: formats, split protocols, limits, the hub (2 s)."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from more_ds.data import rows as data
from more_ds.data.rows import load_examples, load_split
from more_ds.errors import UserError
from more_ds.metrics import evaluate_metrics
from more_ds.tasks import load_suite, resolve_tasks
from more_ds.tasks.render import parse
from more_ds.tasks.schema import HubSource, Label, SplitProtocol, Task

LABELS = (Label("no", ("0",)), Label("yes", ("1",)))


def _task(**fields: Any) -> Task:
    fields = {"labels": LABELS, "path": "s/t", **fields}
    return Task(name="t", suite="s", prompt="{text}", metrics=("accuracy",), primary="accuracy", **fields)


def _rows(count: int, tag: str = "r") -> list[dict[str, Any]]:
    return [{"text": f"{tag}{i}", "label": i % 2} for i in range(count)]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _texts(task: Task, split: str, **options: Any) -> list[str]:
    return [row["text"] for row in load_split(task, split, **options)]


# --- the user's own tasks file -------------------------------------------------------------------

MINE = """
suite: mine
tasks:
  reviews:
    files: {train: data/reviews.csv, test: data/reviews.tsv.gz}
    prompt: "review: {the text}"
    label: verdict
    labels: {bad: negative, good: positive}
    metrics: [accuracy, f1]
    split: {carve_train: 1}
  grades:
    files: {train: data/grades.parquet}
    prompt: "essay: {essay}"
    label: grade
    labels: {range: [1, 5, 1]}
    metrics: [pearson]
  quiz:
    files: {train: data/quiz.jsonl}
    prompt: "quiz: {question}"
    options: answers
    metrics: [accuracy]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    table = 'the text,verdict\n"007, say ""hi""\n there",good\n\nNA,bad\n2020-01-01,good\n'
    (folder / "reviews.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    (folder / "reviews.tsv.gz").write_bytes(gzip.compress("the text\tverdict\r\né, x\tbad\r\n".encode()))
    grades = pyarrow.table({"essay": ["a", "b"], "grade": [4, 2]})
    pyarrow.parquet.write_table(grades, folder / "grades.parquet")
    _write(folder / "quiz.jsonl", [{"question": "q", "answers": ["x", "y", "z"], "label": 2}])
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path / "mine.yaml"


def test_tasks_file_end_to_end(mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path / "data")  # files are found beside the YAML file, wherever we stand
    reviews, grades, quiz = resolve_tasks(tasks_file=mine)
    parts = load_examples(reviews, "train") + load_examples(reviews, "validation")
    got = {example.index: (example.prompt, example.target, example.gold) for example in parts}
    assert got == {
        0: ('review: 007, say "hi"\n there', "positive", 1),
        1: ("review: NA", "negative", 0),
        2: ("review: 2020-01-01", "positive", 1),
    }
    (test,) = load_examples(reviews, "test")
    assert (test.prompt, test.gold) == ("review: é, x", 0)
    assert evaluate_metrics(reviews, [parse(reviews, "negative ", test)], [test.gold])["accuracy"] == 100.0
    assert [(e.target, e.gold) for e in load_examples(grades, "train")] == [("4", 4.0), ("2", 2.0)]
    (example,) = load_examples(quiz, "train")
    assert (example.options, example.target, example.gold) == (("x", "y", "z"), "z", 2)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.tsv.gz", "train.parquet"])
def test_one_data_set_in_every_format_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s/t" / name
    path.parent.mkdir(parents=True)
    rows = _rows(5)
    if ".jsonl" in name:
        _write(path, rows)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "," if "csv" in name else "\t"
        text = "".join(f"{r['text']}{mark}{r['label']}\n" for r in [{"text": "text", "label": "label"}, *rows])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    examples = load_examples(_task(), "train", data_dir=tmp_path)
    assert [(e.index, e.prompt, e.gold) for e in examples] == [(i, f"r{i}", i % 2) for i in range(5)]


# --- split protocols -----------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the hub by generated splits; returns the calls."""
    calls: list[tuple[Any, ...]] = []
    sizes = {"train": 50, "dev": 21, "dev_mm": 4}

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        calls.append((name, config, split, revision))
        return datasets.Dataset.from_list(_rows(sizes[split], split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


SOURCE = HubSource("x/y", "c", "main", {"train": "train", "validation": "dev", "test_hard": "dev_mm"})


def test_halved_validation(hub: list[tuple[Any, ...]]) -> None:
    task = _task(hub=SOURCE, split=SplitProtocol("halve_validation"))
    assert _texts(task, "train") == [f"train{i}" for i in range(50)]
    validation, test = _texts(task, "validation"), _texts(task, "test")
    assert (len(validation), len(test)) == (10, 11)
    assert sorted(validation + test) == sorted(f"dev{i}" for i in range(21)), "not disjoint, or not complete"
    assert validation == sorted(validation, key=lambda text: int(text[3:])) != [f"dev{i}" for i in range(10)]
    for seed in (1, 2):  # the seed of a run decides limits, never what is test
        assert _texts(task, "test", seed=seed) == test
    assert hub[1] == ("x/y", "c", "dev", "main")


def test_split_is_the_same_in_every_version() -> None:
    """Pinned: another test set under the same name would make results incomparable without a word."""
    assert data._cut(8, 4, first=True).tolist() == [0, 1, 3, 6]


def test_carved_train(hub: list[tuple[Any, ...]]) -> None:
    task = _task(hub=SOURCE, split=SplitProtocol("carve_train", 8), extra_tests=("test_hard",))
    train, validation = _texts(task, "train"), _texts(task, "validation")
    assert (len(train), len(validation)) == (42, 8)
    assert sorted(train + validation) == sorted(f"train{i}" for i in range(50))
    assert validation != [f"train{i}" for i in range(8)]
    assert _texts(task, "test") == [f"dev{i}" for i in range(21)]
    assert _texts(task, "test_hard") == [f"dev_mm{i}" for i in range(4)]
    index = {example.prompt: example.index for example in load_examples(task, "validation")}
    assert index == {text: int(text[5:]) for text in validation}, "an index is the row of the source"
    with pytest.raises(UserError, match="carve_train takes 50 rows of train, which has 50; take fewer"):
        load_split(_task(hub=SOURCE, split=SplitProtocol("carve_train", 50)), "train")


def test_given_split_is_refused_when_it_is_not_there(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match=r"task 't': no split 'test' \(of x/y\); did you mean 'test_hard'\?"):
        load_split(_task(hub=SOURCE), "test")
    assert not hub, "nothing is fetched for a split that does not exist"


@pytest.mark.parametrize("protocol", [SplitProtocol("halve_validation"), SplitProtocol("carve_train", 2)])
def test_splits_on_disk_are_followed(protocol: SplitProtocol, tmp_path: Path) -> None:
    for split in ("train", "validation", "test", "test_hard"):
        _write(tmp_path / f"s/t/{split}.jsonl", _rows(6, split))
    task = _task(hub=SOURCE, split=protocol)  # the hub is not asked when there is a data folder
    for split in ("train", "validation", "test", "test_hard"):
        assert _texts(task, split, data_dir=tmp_path) == [f"{split}{i}" for i in range(6)]


def test_protocol_fills_what_the_disk_lacks(tmp_path: Path) -> None:
    _write(tmp_path / "s/t/train.jsonl", _rows(6, "a"))
    _write(tmp_path / "s/t/test.jsonl.gz", _rows(3, "b"))
    task = _task(split=SplitProtocol("carve_train", 2))
    parts = [_texts(task, split, data_dir=tmp_path) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [4, 2, 3]
    assert sorted(parts[0] + parts[1]) == [f"a{i}" for i in range(6)]
    with pytest.raises(UserError, match="no split 'validation'"):
        load_split(_task(split=SplitProtocol("halve_validation")), "validation", data_dir=tmp_path)


def test_limit_is_a_seeded_nested_subset(tmp_path: Path) -> None:
    _write(tmp_path / "s/t/train.jsonl", _rows(40))
    task = _task()
    ten = _texts(task, "train", data_dir=tmp_path, limit=10)
    assert ten == _texts(task, "train", data_dir=tmp_path, limit=10)
    assert ten == sorted(ten, key=lambda text: int(text[1:]))
    assert len(set(ten)) == 10
    assert ten != [f"r{i}" for i in range(10)]
    assert set(ten) < set(_texts(task, "train", data_dir=tmp_path, limit=20))
    assert ten != _texts(task, "train", data_dir=tmp_path, limit=10, seed=1)
    assert _texts(task, "train", data_dir=tmp_path, limit=99) == [f"r{i}" for i in range(40)]
    assert {e.prompt: e.index for e in load_examples(task, "train", data_dir=tmp_path, limit=10)} == {
        text: int(text[1:]) for text in ten
    }
    with pytest.raises(UserError, match="limit is 0"):
        load_split(task, "train", data_dir=tmp_path, limit=0)


# --- the hub -------------------------------------------------------------------------------------


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        assert datasets.are_progress_bars_disabled()
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    levels = [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")]
    shown = not datasets.are_progress_bars_disabled()
    with pytest.raises(UserError) as error:
        load_examples(_task(hub=SOURCE), "train")
    assert str(error.value) == (
        "task 't': cannot load 'x/y' from the hub: no route to host; without a network "
        "give --data_dir with s/t/train.jsonl.gz in it"
    )
    assert levels == [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")]
    assert shown == (not datasets.are_progress_bars_disabled())


def test_no_source_at_all() -> None:
    with pytest.raises(UserError, match=r"names no hub data set and no files; give --data_dir with s/t/train\.jsonl"):
        load_split(_task(), "train")


def test_reference_rows(tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text('tasks: {n: {prompt: "{mr}", references: refs, metrics: [bleu]}}')
    _write(tmp_path / "n/n/test.jsonl.gz", [{"mr": "a", "refs": ["b", "c"]}, {"mr": "d", "refs": ["e"]}])
    (task,) = load_suite(tmp_path / "n.yaml")
    assert [example.gold for example in load_examples(task, "test", data_dir=tmp_path)] == [("b", "c"), ("e",)]
