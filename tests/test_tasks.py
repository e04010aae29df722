"""Templates, labels and rendering (2 s)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from more_ds.errors import UserError
from more_ds.tasks import load_suite, resolve_tasks
from more_ds.tasks.render import answer_value, expand, parse, render
from more_ds.tasks.schema import Scale, Task, label_key
from more_ds.tasks.template import TemplateError, columns, fill

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
