"""The NLG suite on real data and on rows of the hub's form; rows joined into one, subsets, nested columns (6 s)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from more_ds.data.rows import load_examples
from more_ds.errors import UserError
from more_ds.tasks import load_suite, resolve_tasks
from more_ds.tasks.render import expand, prompt_hash, render
from more_ds.tasks.schema import Task


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., Task]:
    """Write a suite of one text task, and rows for it."""

    def write(inside: str, **splits: list[dict[str, Any]]) -> Task:
        (tmp_path / "mine.yaml").write_text(f'tasks: {{t: {{prompt: "{{mr}}", metrics: [bleu], {inside}}}}}')
        (tmp_path / "mine" / "t").mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            path = tmp_path / "mine" / "t" / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_suite(tmp_path / "mine.yaml")[0]

    return write


def grouped(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["meaning_representation"], tuple(text.strip() for text in row["references"])) for row in rows]


@pytest.mark.parametrize(("split", "inputs", "texts"), [("train", 4862, 42061), ("validation", 547, 4672)])
def test_e2e(split: str, inputs: int, texts: int, data_dir: Path) -> None:
    (task,) = resolve_tasks(["e2e_nlg"])
    examples = load_examples(task, split, data_dir=data_dir)
    assert (len(examples), len(expand(examples))) == (inputs, texts)
    found = [(example.prompt.removeprefix("e2e_nlg meaning_representation: "), example.gold) for example in examples]
    assert found == grouped(data_dir / "nlg" / "e2e_nlg" / f"{split}_grouped.jsonl.gz")
    assert task.hub is not None
    assert task.hub.revision == "refs/convert/parquet"


def test_web_nlg(data_dir: Path) -> None:
    (task,) = resolve_tasks(["web_nlg_2017"])
    splits = {name: load_examples(task, name, data_dir=data_dir) for name in ("test", *task.extra_tests)}
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 1862, "test_seen": 971, "test_unseen": 891}
    seen, unseen = ({example.index for example in splits[name]} for name in task.extra_tests)
    assert seen | unseen == set(range(1862))
    assert not seen & unseen
    assert sum(len(expand([example])) for example in splits["test"]) == 4928
    first = splits["test"][0]
    assert first.prompt == "web_nlg_2017 triples: Abilene_Regional_Airport | cityServed | Abilene,_Texas"
    assert first.gold == (
        "Abilene, Texas is served by the Abilene regional airport.",
        "Abilene Regional Airport serves the city of Abilene in Texas.",
    )
    plain = load_examples(task, "test", data_dir=data_dir, limit=1, plain=True)[0]
    assert plain.prompt.startswith("triples: ")


@pytest.mark.parametrize(
    "annotations",
    [
        [{"source": "a", "text": "Ann is 30."}, {"source": "b", "text": "Ann, aged 30."}],  # the authors' JSON
        {"source": ["a", "b"], "text": ["Ann is 30.", "Ann, aged 30."]},  # the hub's parquet
    ],
)
def test_dart(annotations: Any, tmp_path: Path) -> None:
    (task,) = resolve_tasks(["dart"])
    folder = tmp_path / "nlg" / "dart"
    folder.mkdir(parents=True)
    row = {"tripleset": [["Ann", "AGE", "30"]], "subtree_was_extended": False, "annotations": annotations}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = load_examples(task, "test", data_dir=tmp_path)
    assert example.prompt == "dart triples: Ann | AGE | 30"
    assert example.gold == ("Ann is 30.", "Ann, aged 30.")


def test_rows_that_say_the_same_are_one(suite: Callable[..., Task], tmp_path: Path) -> None:
    rows = [
        {"mr": mr, "said": said, "n": n} for n, (mr, said) in enumerate([("a", "x"), ("b", "y"), ("a", ["z", "w"])])
    ]
    task = suite("references: said, group: mr", test=rows)
    first, second = load_examples(task, "test", data_dir=tmp_path)
    assert (first.index, first.prompt, first.gold) == (0, "a", ("x", "z", "w"))
    assert (second.index, second.prompt, second.gold) == (1, "b", ("y",))
    assert len(load_examples(task, "test", data_dir=tmp_path, limit=1)) == 1, "a limit counts inputs"
    single = suite("references: said")
    assert len(load_examples(single, "test", data_dir=tmp_path)) == 3
    assert prompt_hash(single) != prompt_hash(task)


def test_subsets_of_the_test_set(suite: Callable[..., Task], tmp_path: Path) -> None:
    rows = [{"mr": str(i), "r": "x", "kind": kind} for i, kind in enumerate(["new", "old", "new", "newer"])]
    inside = "references: r, extra_tests: {test_new: {kind: new}, test_none: {kind: gone}}"
    task = suite(inside, test=rows)
    assert task.extra_tests == ("test_new", "test_none")
    assert [example.index for example in load_examples(task, "test_new", data_dir=tmp_path)] == [0, 2]
    with pytest.raises(UserError, match="split 'test_none' has no rows"):
        load_examples(task, "test_none", data_dir=tmp_path)
    suite(inside, test_new=rows[:1])
    assert [example.index for example in load_examples(task, "test_new", data_dir=tmp_path)] == [0], "its own file"
    suite(inside, test=[{"mr": "1", "r": "x"}])
    with pytest.raises(UserError, match="subset 'test_none': no column 'kind'; found: mr, r"):
        load_examples(task, "test_none", data_dir=tmp_path)


def test_a_column_within_a_column(suite: Callable[..., Task]) -> None:
    task = suite("references: a.b.c")
    assert render(task, {"mr": "m", "a": {"b": [{"c": "x"}, {"c": "y"}]}}, 0).gold == ("x", "y")
    assert render(task, {"mr": "m", "a.b.c": "whole", "a": {}}, 0).gold == ("whole",)
    for row in ({"mr": "m"}, {"mr": "m", "a": "text"}, {"mr": "m", "a": {"b": {}}}):
        with pytest.raises(UserError, match=r"row 3: no column '(a.b.c|c)'"):
            render(task, row, 3)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ('group: mr, target: "{said}"', "t.group: given without references"),
        ("references: r, extra_tests: {hard: {}}", "t.extra_tests.hard: columns and their values expected, found dict"),
        ("references: r, extra_tests: {hard: {a: [1]}}", "t.extra_tests.hard: columns and their values expected"),
        ("references: r, extra_tests: {hard: true}", "t.extra_tests.hard: a mapping expected"),
        ('references: r, extra_tests: {"../x": {a: 1}}', "'../x' is no name"),
    ],
)
def test_mistakes(inside: str, message: str, suite: Callable[..., Task]) -> None:
    with pytest.raises(UserError) as error:
        suite(inside)
    assert message in str(error.value)


def test_a_row_without_the_column_to_join_by(suite: Callable[..., Task], tmp_path: Path) -> None:
    task = suite("references: r, group: key", test=[{"mr": "1", "r": "x", "key": "k"}, {"mr": "2", "r": "x"}])
    with pytest.raises(UserError, match="task 't', row 1: no column 'key'; found: mr, r"):
        load_examples(task, "test", data_dir=tmp_path)
