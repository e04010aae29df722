"""The eight GLUE tasks on real rows: golden prompts, complete label sets, the top of each metric (8 s)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from more_ds.data.rows import load_examples, load_split
from more_ds.metrics import METRICS, evaluate_metrics
from more_ds.tasks import resolve_tasks
from more_ds.tasks.render import answer_value, parse
from more_ds.tasks.schema import Task

GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]

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
