"""The YAML schema of tasks and its mistakes; choosing tasks by name (3 s)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from more_ds.errors import UserError
from more_ds.tasks import available, load_suite, resolve_tasks, suite_path
from more_ds.tasks.schema import Task

GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
BASE = 'prompt: "say {text}", labels: [bad, good], metrics: [accuracy]'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def one(write: Callable[[str], Path]) -> Callable[[str], Task]:
    """Load a suite of one task, given the inside of its YAML mapping."""
    return lambda inside: load_suite(write(f"tasks: {{t: {{{inside}}}}}"))[0]


MISTAKES = [
    ('promt: "x {text}", labels: [bad, good], metrics: [accuracy]', "t.promt: unknown key; did you mean 'prompt'?"),
    ("labels: [bad, good], metrics: [accuracy]", "t.prompt: missing"),
    ('prompt: "constant", labels: [a, b], metrics: [accuracy]', "names no {column}"),
    ('prompt: ["{text}"], labels: [a, b], metrics: [accuracy]', "t.prompt: text expected, found list"),
    ('prompt: "{text}", labels: [a, b], metrics: [acuracy]', "unknown metric 'acuracy'; did you mean 'accuracy'?"),
    ('prompt: "{text}", labels: [a, b]', "t.metrics: none given; known: accuracy"),
    ('prompt: "{text}", labels: [a, b], metrics: [pearson]', "'pearson' does not fit labels"),
    ('prompt: "{text}", labels: [a, b, c], metrics: [f1]', "'f1' needs two labels"),
    (f"{BASE}, primary: f1", "t.primary: 'f1' is not in metrics; known: accuracy"),
    ('prompt: "{text}", labels: {0: no, 1: yes}, metrics: [accuracy]', "found the boolean False (quote the words"),
    ('prompt: "{text}", labels: {1: a, "1": b}, metrics: [accuracy]', "repeated raw value in ['1', '1']"),
    ('prompt: "{text}", labels: {1: a, 2: a}, metrics: [accuracy]', "repeated word in ['a', 'a']"),
    ('prompt: "{text}", labels: ["1", "0"], metrics: [accuracy]', "could be words or indices"),
    ('prompt: "{text}", labels: [a], metrics: [accuracy]', "t.labels: two or more expected"),
    ('prompt: "{text}", labels: 3, metrics: [accuracy]', "a mapping, a list or a range expected, found int 3"),
    ('prompt: "{text}", labels: {range: [0, 5]}, metrics: [pearson]', "labels.range: [low, high, step] expected"),
    ('prompt: "{text}", labels: {range: [0, 5, 0.3]}, metrics: [pearson]', "no whole number of steps"),
    ('prompt: "{text}", labels: {range: [5, 0, 1]}, metrics: [pearson]', "[low, high, step] expected"),
    ('prompt: "{text}", labels: {range: [.nan, 5, 1]}, metrics: [pearson]', "[low, high, step] expected"),
    ('prompt: "{text}", labels: {range: [0, .inf, 1]}, metrics: [pearson]', "at most 1000"),
    ('prompt: "{text}", labels: {range: [0, 5, 1.0e-9]}, metrics: [pearson]', "at most 1000"),
    ('prompt: "{text}", metrics: [bleu]', "free text needs `references`"),
    ('prompt: "{text}", references: r, label: l, metrics: [bleu]', "t.label: given for free text"),
    (f"{BASE}, references: r", "t.references: given beside labels"),
    (f'{BASE}, target: "so {{text}}"', "lacks {answer}"),
    ('prompt: "{text}", options: [a], metrics: [accuracy]', "t.options: two or more expected"),
    ('prompt: "{text}", options: [a, b], labels: {range: [0, 1, 1]}, metrics: [accuracy]', "cannot name options"),
    (f"{BASE}, split: thirds", "t.split: given, halve_validation or {carve_train: N} expected"),
    (f"{BASE}, split: {{carve_train: 0}}", "t.split.carve_train: a positive integer expected"),
    (f"{BASE}, max_new_tokens: -1", "t.max_new_tokens: a positive integer expected, found int -1"),
    (f"{BASE}, transform: letered_options", "did you mean 'lettered_options'?"),
    (f"{BASE}, files: {{train: a.xlsx}}", "'a.xlsx' is no file that can be read"),
    (f"{BASE}, hub: {{id: x/y}}, files: {{train: a.csv}}", "t.files: given beside hub"),
    (f"{BASE}, hub: {{config: z}}", "t.hub.id: missing"),
    (f"{BASE}, hub: {{id: x, confg: z}}", "t.hub.confg: unknown key; did you mean 'config'?"),
    (f"{BASE}, path: ../../etc", "'../../etc' leaves the data folder"),
    (f"{BASE}, path: /etc", "'/etc' leaves the data folder"),
    (f'{BASE}, extra_tests: ["../x"]', "'../x' is no name"),
]


@pytest.mark.parametrize(("inside", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_schema_mistake(inside: str, message: str, one: Callable[[str], Task]) -> None:
    with pytest.raises(UserError) as error:
        one(inside)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).count("tasks.t.") <= 1 + ("promt" in inside or "yes" in inside), "complaints breed"


def test_every_mistake_of_a_file_is_reported_once(write: Callable[[str], Path]) -> None:
    path = write(
        "suit: x\ntasks:\n"
        '  "../a": {prompt: "{t}", labels: [a, b], metrics: [accuracy]}\n'
        '  b: {promt: "{t}", labels: [a, b], metrics: accuracy}\n'
        '  c: {prompt: "{t.x}", labels: [a, b], metrics: [accuracy], metrics: [f1]}\n'
    )
    with pytest.raises(UserError) as error:
        load_suite(path)
    parts = str(error.value).removeprefix(f"{path}: ").split("; ")
    for part in (
        "line 5: duplicate key 'metrics'",
        "suit: unknown key",
        "tasks.../a: '../a' is no name",
        "tasks.b.promt: unknown key",
        "tasks.b.prompt: missing",
        "tasks.c.prompt: '{t.x}' in template '{t.x}' is not a column name (letters, digits, '_', '-', spaces",
    ):
        assert part in parts
    assert sum("tasks.b.metrics: a list of texts expected" in part for part in parts) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: !!python/object/apply:os.system ['touch {marker}']", "is not plain YAML"),
        ("tasks: {a: !!python/name:os.system }", "is not plain YAML"),
        ("tasks: {a: [", "is not plain YAML"),
        ("- a", "a mapping with 'tasks' expected, found list"),
        ("suite: x", "tasks: no task given"),
        ("tasks: [a]", "tasks: a mapping expected, found list"),
        ("tasks: {a: b}", "tasks.a: a mapping expected, found str 'b'"),
        ("suite: ..\ntasks: {a: {}}", "suite: '..' is no name"),
    ],
)
def test_hostile_or_malformed_file(text: str, message: str, write: Callable[[str], Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(UserError) as error:
        load_suite(write(text.replace("{marker}", str(marker))))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_missing_tasks_file() -> None:
    with pytest.raises(UserError, match=r"cannot read the tasks file nowhere\.yaml"):
        load_suite("nowhere.yaml")


def test_defaults_and_inheritance(write: Callable[[str], Path]) -> None:
    text = f"suite: mine\ncitation: C\nversion: 1.5\ntasks: {{a: {{{BASE}}}, b: {{{BASE}, citation: D}}}}"
    a, b = load_suite(write(text))
    assert (a.suite, a.path, a.citation, a.version, a.primary, a.label) == (
        "mine",
        "mine/a",
        "C",
        "1.5",
        "accuracy",
        "label",
    )
    assert b.citation == "D"
    assert a.kind == "labels"
    assert a.hub is None
    assert not a.files


def test_suites_that_come_with_the_package() -> None:
    suites = available()
    assert [task.name for task in suites["glue"]] == GLUE
    assert len(suites["demo"]) >= 8
    for tasks in suites.values():
        for task in tasks:
            assert task.plain_prompt
            assert task.name not in task.plain_prompt, "the plain prompt gives the task away"


def test_resolve_tasks(write: Callable[[str], Path]) -> None:
    assert [task.name for task in resolve_tasks(suites=["glue"])] == GLUE
    assert [task.name for task in resolve_tasks(["sst2", "cola"])] == ["sst2", "cola"]
    mine = write(f"tasks: {{own: {{{BASE}}}}}")
    assert [task.name for task in resolve_tasks(tasks_file=mine)] == ["own"]
    assert [task.suite for task in resolve_tasks(["own", "rte"], tasks_file=mine)] == ["mine", "glue"]
    clash = write(f"tasks: {{rte: {{{BASE}}}}}")
    for call, message in (
        (lambda: resolve_tasks(["ctola"]), "unknown task 'ctola'; did you mean 'cola'?"),
        (lambda: resolve_tasks(["cola"], suites=["demo"]), "unknown task 'cola'"),
        (lambda: resolve_tasks(suites=["glu"]), "unknown suite 'glu'; did you mean 'glue'?"),
        (lambda: resolve_tasks(["cola", "cola"]), "named twice"),
        (lambda: resolve_tasks(), "no task chosen"),
        (lambda: resolve_tasks([]), "no task chosen"),
        (lambda: resolve_tasks(["rte"], tasks_file=clash), "task 'rte' is in 'glue', 'mine'"),
        (lambda: suite_path("x"), "unknown suite 'x'"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            call()
