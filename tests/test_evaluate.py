"""Metrics, records and routing of an evaluation, at any batch size and number of ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, matthews_corrcoef
from tiny_models import text_model
from toy_suite import IDS, NAMES, SUITE, assert_same, on_ranks, toy_examples, toy_scores

from more_ds.errors import UserError
from more_ds.evaluate import evaluate
from more_ds.results import mean_score, result_table, write_results
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options
from more_ds.tasks import Task, load_suite
from more_ds.tasks.render import answer_value, prompt_hash
from more_ds.text_model import TextModel


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    (tmp_path / "toy.yaml").write_text(SUITE)
    return load_suite(tmp_path / "toy.yaml")


def test_metrics_are_those_of_the_best_scored_option(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    results = {result.task: result for result in toy_scores(model, tasks, 4)}
    assert list(results) == NAMES
    assert [results[name].mode for name in NAMES] == ["likelihood"] * 3 + ["generation"]
    for task in tasks[:3]:
        found, gold = [], []
        for example in toy_examples(tasks)[task.name]:
            prompt = model.encoder.prompt(example.prompt)
            options = [model.encoder.target(text) for text in example.options]
            scores = rank_options(model, [prompt], [IDS[task.name]], [options])[0]
            found.append(answer_value(task, int(torch.tensor(scores).argmax())))
            gold.append(example.gold)
        assert [record["prediction"] for record in results[task.name].records] == found
        if task.name == "accept":
            assert results["accept"].metrics["accuracy"] == pytest.approx(100 * accuracy_score(gold, found))
            assert results["accept"].score == pytest.approx(100 * matthews_corrcoef(gold, found))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["likelihood", "generation"])
def test_batch_size_changes_nothing(tasks: list[Task], kind: str, mode: str) -> None:
    model = text_model(kind, NAMES)
    assert_same(toy_scores(model, tasks, 1, 4, mode=mode), toy_scores(model, tasks, 7, 4, mode=mode))


def test_every_example_is_answered_for_its_own_task(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    examples = toy_examples(tasks)
    mixed = toy_scores(model, tasks, 5)
    apart = [evaluate(model, [t], examples, task_ids=IDS, batch_size=3, label=None)[0] for t in tasks]
    assert_same(mixed, apart)
    swapped = evaluate(
        model, tasks, examples, task_ids=dict(zip(NAMES, (1, 2, 3, 0), strict=True)), batch_size=5, label=None
    )
    assert all(a.records[0]["scores"] != b.records[0]["scores"] for a, b in zip(mixed[:3], swapped, strict=False))


def test_generation_counts_what_is_no_option(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama", NAMES)
    answers = {"accept": ["good", "nonsense"], "grade": ["1.5", "3.0"], "choose": ["it is", ""], "tell": ["no", ""]}
    queue = dict.fromkeys(NAMES, 0)

    def spoken(model: TextModel, prompts: Any, task_ids: Sequence[int], *rest: Any) -> list[list[int]]:
        rows = []
        for task_id in task_ids:
            name = NAMES[task_id]
            text = answers[name][queue[name] % 2]
            queue[name] += 1
            rows.append([*model.encoder.tokenizer(text, add_special_tokens=False).input_ids, 1, 0])
        return rows

    monkeypatch.setattr("more_ds.scoring.answering.generate", spoken)
    results = {r.task: r for r in toy_scores(model, tasks, 50, mode="generation")}
    assert {name: r.unparsable for name, r in results.items()} == {"accept": 5, "grade": 5, "choose": 11, "tell": 0}
    found = [1 if r["text"] == "good" else -1 for r in results["accept"].records]
    gold = [i % 2 for i in range(11)]
    assert results["accept"].metrics["accuracy"] == pytest.approx(100 * accuracy_score(gold, found))
    assert results["tell"].metrics["exact_match"] == pytest.approx(100 * 6 / 11)


def test_generation_stops_where_the_longest_answer_would(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama", NAMES)
    limits = set()

    def noted(model: TextModel, prompts: Any, task_ids: Sequence[int], limit: int, beams: int) -> list[list[int]]:
        limits.update((NAMES[task_id], limit) for task_id in task_ids)
        return generate(model, prompts, task_ids, limit, beams)

    monkeypatch.setattr("more_ds.scoring.answering.generate", noted)
    toy_scores(model, tasks, 50, mode="generation")
    longest = len("it is something longer!") + 2  # the space in front, and EOS
    assert limits == {("accept", 6), ("grade", 5), ("choose", longest), ("tell", 6)}


def test_prompts_that_are_cut_are_counted(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    model.encoder.max_source_length = 20
    expected = sum(len(e.prompt) + 1 > 20 for e in toy_examples(tasks)["accept"])
    result = toy_scores(model, tasks, 4)[0]
    assert 0 < result.cut == expected < result.n
    assert "cut" in result_table([result]).splitlines()[0]


def test_a_task_that_the_adapter_does_not_know(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES[:2])
    with pytest.raises(UserError, match=r"does not know 'choose', 'tell'; it knows: accept, grade"):
        evaluate(model, tasks, toy_examples(tasks), task_ids={"accept": 0, "grade": 1}, batch_size=4, label=None)


def test_majority_and_standard_error(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    golds = {"accept": [1, 1, 0]}
    first, _, third, text = toy_scores(model, tasks, 8, train_golds=golds, resamples=50)
    assert first.majority == {"matthews": 0.0, "accuracy": pytest.approx(100 * 5 / 11)}
    assert third.majority is None
    assert first.standard_errors.keys() == first.metrics.keys()
    assert third.standard_errors["accuracy"] > 0
    assert third.standard_errors == toy_scores(model, tasks, 3, resamples=50)[2].standard_errors
    assert text.standard_errors.keys() == {"exact_match"}
    assert toy_scores(model, tasks, 8)[0].standard_errors == {}


def test_hashes_tell_other_prompts_and_other_examples(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    whole, limited = toy_scores(model, tasks, 8), toy_scores(model, tasks, 8, 7)
    assert [r.prompt for r in whole] == [r.prompt for r in limited]
    assert not {r.data for r in whole} & {r.data for r in limited}
    assert len({r.prompt for r in whole}) == 4
    changed = [replace(tasks[0], prompt="accept {text}"), replace(tasks[0], labels=tasks[0].labels[::-1])]
    changed += [replace(tasks[0], target="so {answer}"), tasks[0]]
    assert len({prompt_hash(task) for task in changed}) == 4
    assert prompt_hash(replace(tasks[0], plain_prompt="accept {text}"), plain=True) == prompt_hash(changed[0])
    assert re.fullmatch("[0-9a-f]{12}", whole[0].prompt)


def test_results_on_disk(tasks: list[Task], tmp_path: Path) -> None:
    results = toy_scores(text_model("llama", NAMES), tasks, 8)
    write_results(tmp_path / "out", results, {"subject": "toy"})
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"]) for row in rows] == [(name, i) for name in NAMES for i in range(11)]
    assert rows[0]["options"] == ["bad", "good"]
    assert rows[0]["prediction"] == max((0, 1), key=rows[0]["scores"].__getitem__)
    assert rows[-1]["gold"] == list(toy_examples(tasks)["tell"][-1].gold)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["subject"] == "toy"
    assert [entry["metrics"] for entry in document["results"]] == [result.metrics for result in results]
    assert f"{mean_score(results):.2f}" in result_table(results).splitlines()[-1]


def test_two_and_three_ranks_give_the_numbers_of_one(tasks: list[Task]) -> None:
    model = text_model("llama", NAMES)
    alone = [toy_scores(model, tasks, 4, 5, mode=mode) for mode in ("likelihood", "generation")]

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        return [toy_scores(model, tasks, 4, 5, mode=mode) for mode in ("likelihood", "generation")]

    for world in (2, 3):
        for found in on_ranks(world, job):
            assert not isinstance(found, str), found
            for one, other in zip(alone, found, strict=True):
                assert_same(one, other)


def test_partitioned_ranks_wait_for_the_one_with_most_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("more_ds.scoring.likelihood.TREE_TOKENS", 8)
    model = text_model("llama", NAMES)
    next(model.peft.parameters()).ds_numel = 1  # the mark that ZeRO-3 leaves on a parameter
    options = [[[5, 1], [6, 1]], [[n, 1] for n in range(5, 25)]]

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        passes = []
        model.module.register_forward_hook(lambda *_: passes.append(1))
        return rank_options(model, [[2, 7]], [1], options[rank : rank + 1])[0], len(passes)

    (few, passes), (many, others) = on_ranks(2, job)
    assert passes == others == 20 * 2 / 8
    assert (len(few), len(many)) == (2, 20)
    assert few == pytest.approx(many[:2], abs=1e-5)


def test_partitioned_ranks_take_the_same_number_of_passes(tasks: list[Task]) -> None:
    """Where parameters are spread over ranks every rank must run every pass, with or without a batch of its own."""
    model = text_model("llama", NAMES)
    tasks = tasks[:3]
    alone = toy_scores(model, tasks, 3)
    next(model.peft.parameters()).ds_numel = 1

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        passes = []
        model.module.register_forward_hook(lambda *_: passes.append(1))
        # 33 examples in batches of 3: eleven batches, so that the second rank has none in the last turn.
        return toy_scores(model, tasks, 3), len(passes)

    (first, passes), (second, others) = on_ranks(2, job)
    assert passes == others > 0
    assert_same(alone, first)
    assert_same(alone, second)
