"""Tasks as data: the YAML schema and its mistakes, templates, rendering, and real GLUE rows (5 s)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from more_ds.data import load_examples, load_split
from more_ds.errors import UserError
from more_ds.metrics import METRICS, evaluate_metrics
from more_ds.tasks import available, load_suite, resolve_tasks, suite_path
from more_ds.tasks.render import answer_value, expand, parse, render
from more_ds.tasks.schema import Scale, Task, label_key
from more_ds.tasks.template import TemplateError, columns, fill

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


# --- templates ---------------------------------------------------------------------------------


def test_template_fills_columns_and_escapes() -> None:
    row = {"a": "x {b} {{", "b c": 2.5, "d": True, "e": 3}
    assert fill("{{{a}}} {b c}/{d}/{e} }}", row) == "{x {b} {{} 2.5/true/3 }"
    assert columns("{b} {a} {b} {{c}}") == ("b", "a")


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a", "a}", "{a{b}}", "{ a}", "{{a}", "{a()}"],
)
def test_template_refuses_everything_but_columns(template: str, one: Callable[[str], Task]) -> None:
    with pytest.raises(TemplateError):
        columns(template)
    with pytest.raises(UserError, match=r"tasks\.t\.prompt"):
        one(f'prompt: "{template}", labels: [bad, good], metrics: [accuracy]')


def test_template_never_touches_the_object() -> None:
    class Trap(str):
        def __format__(self, spec: str) -> str:
            raise AssertionError("formatted")

    assert fill("{a}", {"a": Trap("{b.__class__}")}) == "{b.__class__}"
    with pytest.raises(TemplateError, match="no column '__class__'; found: a"):
        fill("{__class__}", {"a": "x"})


@pytest.mark.parametrize(("value", "what"), [(None, "empty"), ([1], "a list"), ({"x": 1}, "a dict")])
def test_template_value_must_be_text_or_number(value: Any, what: str) -> None:
    with pytest.raises(TemplateError, match=f"column 'a' is {what}"):
        fill("{a}", {"a": value})


# --- YAML mistakes -----------------------------------------------------------------------------

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


# --- finding tasks -----------------------------------------------------------------------------


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


# --- labels ------------------------------------------------------------------------------------


def test_label_key_agrees_across_formats() -> None:
    assert {label_key(v) for v in (1, 1.0, "1", " 1 ")} == {"1"}
    assert {label_key(v) for v in (True, "true", "True")} == {"true"}
    assert label_key(0.5) == "0.5"
    assert label_key("entails") == "entails"
    for value in (None, [1], {"a": 1}):
        with pytest.raises(ValueError, match="neither text, number nor boolean"):
            label_key(value)


def test_scale_values_words_and_rounding() -> None:
    scale = Scale(0.0, 5.0, 0.2)
    assert scale.words == tuple(f"{i / 5:.1f}" for i in range(26))
    assert scale.values == tuple(i / 5 for i in range(26))
    # By hand: 3.857 is 0.057 above 3.8 and 0.143 below 4.0; 0.1 and 2.5 are ties (even index wins).
    for value, word in (
        (3.857, "3.8"),
        (0.0, "0.0"),
        (5.0, "5.0"),
        (0.1, "0.0"),
        (0.3, "0.4"),
        (2.5, "2.4"),
        (4.95, "5.0"),
    ):
        assert scale.words[scale.nearest(value)] == word, value
    assert scale.nearest(3.799999952316284) == scale.nearest(3.8)  # the 32-bit copy of 3.8
    assert scale.nearest(0.10000000149011612) == scale.nearest(0.1)  # also at a tie
    for value in (-0.1, 5.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="outside"):
            scale.nearest(value)
    assert Scale(1, 5, 1).words == ("1", "2", "3", "4", "5")
    assert Scale(-1.0, 1.0, 0.25).words[:2] == ("-1.00", "-0.75")


# --- rendering ---------------------------------------------------------------------------------


def test_render_labels_with_a_wrapped_target(one: Callable[[str], Task]) -> None:
    task = one(
        'prompt: "q: {q} ", target: "It is {answer}.", labels: {n: "no", y: "yes"}, label: l, metrics: [accuracy]'
    )
    example = render(task, {"q": " a ", "l": "y"}, 7)
    assert dataclasses.astuple(example) == ("t", 7, "q:  a", "It is yes.", ("It is no.", "It is yes."), 1)
    assert parse(task, " It is no.\n", example) == 0
    assert parse(task, "no", example) is None


def test_list_of_labels_takes_words_and_indices(one: Callable[[str], Task]) -> None:
    task = one('prompt: "{s}", labels: [entails, neutral], metrics: [accuracy]')
    golds = [render(task, {"s": "x", "label": label}, 0).gold for label in ("neutral", 1, "1", "entails", 0)]
    assert golds == [1, 1, 1, 0, 0]


def test_render_options(one: Callable[[str], Task]) -> None:
    row = {"q": "why", "a": "x", "b": "y", "label": 1, "key": "B", "options": ["u", "v", "w"]}
    task = one('prompt: "{q}", options: [a, "({b})"], metrics: [accuracy]')
    assert dataclasses.astuple(render(task, row, 0))[3:] == ("(y)", ("x", "(y)"), 1)
    task = one('prompt: "{q}", options: [a, b], labels: [A, B], label: key, metrics: [accuracy]')
    assert render(task, row, 0).gold == 1
    task = one('prompt: "{q} {lettered}", options: options, transform: lettered_options, metrics: [accuracy]')
    example = render(task, row, 0)
    assert (example.prompt, example.options, example.target) == ("why (A) u (B) v (C) w", ("u", "v", "w"), "v")
    assert parse(task, "w", example) == 2 == answer_value(task, 2)
    with pytest.raises(UserError, match="allowed: the index of an option, 0 to 2"):
        render(task, {**row, "label": 3}, 0)


def test_render_references_and_expand(one: Callable[[str], Task]) -> None:
    task = one('prompt: "{mr}", references: refs, metrics: [bleu]')
    several = render(task, {"mr": "m", "refs": ["one", "two"]}, 3)
    assert several.gold == ("one", "two")
    assert several.options == ()
    assert several.target == "one"
    single = render(task, {"mr": "n", "refs": "three"}, 4)
    assert [(e.index, e.prompt, e.target) for e in expand([several, single])] == [
        (3, "m", "one"),
        (3, "m", "two"),
        (4, "n", "three"),
    ]
    assert parse(task, " free ", several) == "free"
    for refs in ([], "", ["a", " "], [1], None, {"a": 1}):
        with pytest.raises(UserError, match="task 't', row 5"):
            render(task, {"mr": "m", "refs": refs}, 5)
    closed = render(one(BASE), {"text": "x", "label": 0}, 0)
    assert expand([closed]) == [closed]


def test_render_target_from_columns(one: Callable[[str], Task]) -> None:
    task = one('prompt: "{a}", target: "{b}!", metrics: [exact_match]')
    example = render(task, {"a": "x", "b": "y"}, 0)
    assert (example.target, example.gold) == ("y!", ("y!",))


def test_linearise_triples(one: Callable[[str], Task]) -> None:
    task = one('prompt: "{triples}", references: r, transform: linearise_triples, metrics: [bleu]')
    row = {"tripleset": [["a", "b", "c"], ["d", "e", "f"]], "r": "x"}
    assert render(task, row, 0).prompt == "a | b | c; d | e | f"
    for bad in (None, [], [["a", "b"]], [3]):
        with pytest.raises(UserError, match=r"task 't', row 0.*triple"):
            render(task, {**row, "tripleset": bad}, 0)


@pytest.mark.parametrize("label", [2, -1, "x", None, [0], 0.5, float("nan")])
def test_label_outside_the_set(label: Any) -> None:
    cola, stsb = resolve_tasks(["cola", "stsb"])
    with pytest.raises(UserError) as error:
        render(cola, {"sentence": "x", "label": label}, 12)
    assert str(error.value) == (
        f"task 'cola', row 12: label {label!r} in column 'label' is outside the set; allowed: 0, 1"
    )
    if label not in (2, 0.5):
        with pytest.raises(UserError, match=r"allowed: a number from 0\.0 to 5\.0"):
            render(stsb, {"sentence1": "x", "sentence2": "y", "label": label}, 0)


def test_missing_columns_and_prompts(one: Callable[[str], Task]) -> None:
    (cola,) = resolve_tasks(["cola"])
    with pytest.raises(UserError, match="task 'cola', row 3: no column 'sentence'; found: label, text"):
        render(cola, {"text": "x", "label": 0}, 3)
    with pytest.raises(UserError, match="task 'cola', row 3: no column 'label'; found: sentence"):
        render(cola, {"sentence": "x"}, 3)
    with pytest.raises(UserError, match="has no plain_prompt"):
        render(one(BASE), {"text": "x", "label": 0}, 0, plain=True)


# --- the eight real GLUE tasks -----------------------------------------------------------------

GOLDEN = {
    "cola": ("cola sentence: Our friends won't buy this analysis, let alone the next one we propose.", "acceptable", 1),
    "mnli": (
        "mnli hypothesis: We are especially sad this year because we lost a lot of people. premise: Our hearts are "
        "particularly heavy this year as we look back at those we've lost, the Globe writes lovingly.",
        "entailment",
        0,
    ),
    "mrpc": (
        'mrpc sentence1: Amrozi accused his brother , whom he called " the witness " , of deliberately distorting his '
        'evidence . sentence2: Referring to him as only " the witness " , Amrozi accused his brother of deliberately '
        "distorting his evidence .",
        "equivalent",
        1,
    ),
    "qnli": (
        "qnli question: What sector has expanded radiply by selling outsourcing services to North America and Europe? "
        "sentence: The IT sector has been stimulated by new Egyptian entrepreneurs with government encouragement."
        "[citation needed]",
        "not_entailment",
        1,
    ),
    "qqp": (
        "qqp question1: How do I get inside University College London being an Indian? question2: Which is better, "
        "masters in computer science at Arizona State University or University College London for a foreigner "
        "(Indian National)?",
        "not_duplicate",
        0,
    ),
    "rte": (
        "rte sentence1: No Weapons of Mass Destruction Found in Iraq Yet. "
        "sentence2: Weapons of Mass Destruction Found in Iraq.",
        "not_entailment",
        1,
    ),
    "sst2": ("sst2 sentence: hide new secretions from the parental units", "negative", 0),
    "stsb": ("stsb sentence1: A plane is taking off. sentence2: An air plane is taking off.", "5.0", 5.0),
}
ROWS = {
    "cola": (7677, 855, 1043),
    "mnli": (8999, 1000, 9815),
    "mrpc": (3301, 367, 408),
    "qnli": (8999, 1000, 5463),
    "qqp": (10949, 999, 7600),
    "rte": (2241, 249, 277),
    "sst2": (66080, 1000, 872),
    "stsb": (5164, 573, 1500),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_rows(name: str, data_dir: Path) -> None:
    (task,) = resolve_tasks([name], suites=["glue"])
    splits = {split: load_examples(task, split, data_dir=data_dir) for split in ("train", "validation", "test")}
    assert tuple(map(len, splits.values())) == ROWS[name]
    first = splits["train"][0]
    assert (first.prompt, first.target, first.gold) == GOLDEN[name]
    assert load_examples(task, "train", data_dir=data_dir, limit=1, plain=True)[0].prompt.count(f"{name} ") == 0
    for examples in splits.values():
        assert {example.options for example in examples} == {task.words}
        assert {example.target for example in examples} == set(task.words), "an answer never occurs, or a stray one"
    _check_bounds(task, splits["validation"])
    for extra in task.extra_tests:
        assert len(load_split(task, extra, data_dir=data_dir)) == 9832


def _check_bounds(task: Task, examples: list[Any]) -> None:
    """Right answers, read from generated text, reach the top of each metric."""
    read = [parse(task, f" {example.target}\n", example) for example in examples]
    golds = [example.gold for example in examples]
    ranked = [answer_value(task, example.options.index(example.target)) for example in examples]
    assert read == ranked
    for metric, score in evaluate_metrics(task, read, golds).items():
        # Rounding STS-B's scores to 0.2 costs a little correlation.
        assert score == pytest.approx(METRICS[metric].high, abs=0.6 if task.name == "stsb" else 1e-9)
