"""The commonsense and transfer suites: golden prompts, every local row, and rows in the hub's form for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from more_ds.data.rows import load_examples
from more_ds.errors import UserError
from more_ds.tasks import available, resolve_tasks
from more_ds.tasks.render import render

LOCAL = {
    "commonsense/boolq": (1800, 200, 3270),
    "openbookqa": (4455, 500, 500),
    "arc_easy": (2249, 570, 2376),
    "arc_challenge": (1119, 299, 1172),
    "scitail": (548, 1304, 2126),
    "transfer/boolq": (1800, 200, 3270),
}
FIRST = {
    "commonsense/boolq": (
        "Please answer the following question with true or false, question: was the color orange named after the "
        "fruit?\n\nAnswer format: true/false",
        "the correct answer is true",
        1,
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: The sun is responsible for\n\nAnswer1: puppies learning new "
        "tricks Answer2: children growing up and getting old Answer3: flowers wilting in a vase Answer4: plants "
        "sprouting, blooming and wilting\n\nAnswer format: answer1/answer2/answer3/answer4",
        "the correct answer is answer4",
        3,
    ),
    "scitail": (
        "scitail premise: They stress the role that the musculo-skeletal system (nerves, joints, muscles, and bones) "
        "plays in disease, illness, and injury. hypothesis: You call the part of the skeletal system that connects "
        "bones joints.",
        "neutral",
        1,
    ),
}
# A row in the hub's columns, its prompt, its answer and the index of that.
HUB: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "piqa": (
        {"goal": "Make outdoor pillow.", "sol1": "Blow into tin can.", "sol2": "Blow into trash bag.", "label": 1},
        "Please choose the correct solution to the question: Make outdoor pillow.\n\nSolution1: Blow into tin can.\n\n"
        "Solution2: Blow into trash bag.\n\nAnswer format: solution1/solution2",
        "the correct answer is solution2",
        1,
    ),
    "siqa": (
        {"context": "Tracy slept.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        "Please choose the correct answer to the question: Tracy slept. Why?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "the correct answer is answer3",
        2,
    ),
    "hellaswag": (
        {"activity_label": "Roofing", "ctx": "A man sits. he", "endings": ["a.", "b.", "c.", "d."], "label": "0"},
        "Please choose the correct ending to complete the given sentence: Roofing: A man sits. he\n\nEnding1: a. "
        "Ending2: b. Ending3: c. Ending4: d.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending1",
        0,
    ),
    "winogrande": (
        {"sentence": "Ian or Dennis: _ ate.", "option1": "Ian", "option2": "Dennis", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ian or Dennis: _ ate."
        "\n\nOption1: Ian Option2: Dennis Answer format: option1/option2",
        "the correct answer is option2",
        1,
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "idx": 0, "label": 1},
        "cb premise: It rains. hypothesis: It is dry.",
        "contradiction",
        1,
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_every_local_row_is_rendered_with_both_prompts(name: str, data_dir: Path) -> None:
    [task] = resolve_tasks([name])
    splits = ("train", "validation", "test")
    found = [load_examples(task, split, data_dir=data_dir) for split in splits]
    assert tuple(map(len, found)) == LOCAL[name]
    for split, examples in zip(splits, found, strict=True):
        plain = load_examples(task, split, data_dir=data_dir, plain=True)
        assert [e.gold for e in plain] == [e.gold for e in examples]
        assert all(e.options[int(e.gold)] == e.target and len(set(e.options)) == len(e.options) for e in examples)  # type: ignore[arg-type]
    if name in FIRST:
        first = found[0][0]
        assert (first.prompt, first.target, first.gold) == FIRST[name]


@pytest.mark.parametrize("name", HUB)
def test_rows_in_the_hubs_columns(name: str) -> None:
    [task] = resolve_tasks([name])
    row, prompt, target, gold = HUB[name]
    example = render(task, row, 0)
    assert (example.prompt, example.target, example.gold) == (prompt, target, gold)
    assert render(task, row, 0, plain=True).target == target


@pytest.mark.parametrize(
    ("labels", "key", "gold"), [("ABC", "C", 2), ("ABCDE", "E", 4), ("1234", "1", 0), (["1", "2", "3"], "3", 2)]
)
def test_arc_has_three_to_five_choices_under_letters_or_numbers(labels: Any, key: str, gold: int) -> None:
    [task] = resolve_tasks(["arc_easy"])
    row = {"question": "Q", "choices": {"text": [f"t{x}" for x in labels], "label": list(labels)}, "answerKey": key}
    example = render(task, row, 0)
    assert (len(example.options), example.gold) == (len(labels), gold)
    assert example.prompt.endswith(f"Answer format: {'/'.join(f'answer{i + 1}' for i in range(len(labels)))}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}, "'C' is none of"),
        ({"question": "Q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "as many labels"),
        ({"question": "Q", "choices": ["a", "b"], "answerKey": "A"}, "as many labels"),
    ],
)
def test_a_damaged_choice_is_named(row: dict[str, Any], message: str) -> None:
    [task] = resolve_tasks(["arc_easy"])
    with pytest.raises(UserError, match=rf"task 'arc_easy', row 7: .*{message}"):
        render(task, row, 7)


def test_what_a_suite_promises() -> None:
    suites = available()
    assert len(suites["commonsense"]) == 8
    assert [task.name for task in suites["transfer"]] == ["scitail", "cb", "boolq"]
    for task in (*suites["commonsense"], *suites["transfer"]):
        assert task.hub is not None
        assert task.plain_prompt
        assert task.citation
        assert task.metrics == ("accuracy",)
        # Without a labelled public test set, one must be made.
        assert ("test" in task.hub.splits) == (task.split.kind == "given")


def test_a_name_in_two_suites_needs_its_suite() -> None:
    with pytest.raises(UserError, match=r"in 'commonsense', 'transfer'; choose commonsense/boolq or transfer/boolq"):
        resolve_tasks(["boolq"])
    assert resolve_tasks(["boolq"], ["transfer"]) == resolve_tasks(["transfer/boolq"])
    assert resolve_tasks(["transfer/boolq", "cola"])[0].suite == "transfer"
    with pytest.raises(UserError, match="named twice"):
        resolve_tasks(["transfer/boolq", "commonsense/boolq"])
    with pytest.raises(UserError, match="did you mean 'transfer/boolq'"):
        resolve_tasks(["transfer/bolq"], ["transfer"])
