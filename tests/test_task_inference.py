"""Finding the task of a prompt: the contrastive loss itself is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import text_model
from toy_suite import NAMES, toy_examples, toy_scores, write_toy

from eval import run as eval_run
from more_ds import evaluate as evaluate_module
from more_ds.errors import UserError
from more_ds.scoring import answering
from more_ds.scoring.task_inference import infer_tasks
from more_ds.tasks import load_suite
from more_ds.text_model import TextModel

TEXTS = ["a b", "what is it?", "yes", "the longest of all of these prompts", "%%%%", "Z9", "no no no", "once upon"]
KINDS = [("llama", {}), ("llama", {"pooling": "last", "task_dim": 5}), ("t5", {"contrastive_maps": "encoder"})]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("inference"))


def make(kind: str, switches: dict[str, Any]) -> tuple[TextModel, list[list[int]]]:
    model = text_model(kind, NAMES, **switches)
    return model, [model.encoder.prompt(text) for text in TEXTS]


def loss_as(model: TextModel, prompt: list[int], task: int) -> float:
    """The contrastive loss of one prompt that is trained on as `task`."""
    model.peft.train()
    for module in model.peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = model.collator.answers([prompt], [[4, 5]], [task])
    model.label_logits(batch)
    loss = model.auxiliary_loss()
    assert loss is not None
    model.peft.eval()
    return float(loss.detach())


@pytest.mark.parametrize(("kind", "switches"), KINDS)
def test_the_task_with_the_lowest_contrastive_loss_wins(kind: str, switches: dict[str, Any]) -> None:
    model, prompts = make(kind, switches)
    found, votes = infer_tasks(model, prompts)
    losses = [[loss_as(model, prompt, task) for task in range(len(NAMES))] for prompt in prompts]
    assert found == [min(range(len(NAMES)), key=row.__getitem__) for row in losses]
    assert len(set(found)) > 1
    maps = max(max(row) for row in votes)
    assert 0 < maps <= len(model.peft.base_model.ranks())  # type: ignore[union-attr, operator]
    assert not model.module.training


@pytest.mark.parametrize(("kind", "switches"), KINDS)
def test_a_prompt_does_not_depend_on_its_batch(kind: str, switches: dict[str, Any]) -> None:
    model, prompts = make(kind, switches)
    together, votes = infer_tasks(model, prompts)
    alone = [infer_tasks(model, [prompt]) for prompt in prompts]
    assert together == [found[0] for found, _ in alone]
    assert votes == [row[0] for _, row in alone]


def test_votes_count_the_maps_to_which_the_task_is_nearest() -> None:
    model, prompts = make("llama", {"target_modules": ["q_proj"]})
    tuner: Any = model.peft.base_model
    layers = [m for m in tuner.model.modules() if hasattr(m, "more_task")]
    assert len(layers) == 2
    with (
        torch.no_grad()
    ):  # the first map's inputs are the same for every task: its embeddings are the prompts themselves
        layers[0].more_gate["default"].weight.zero_()
        layers[1].more_gate["default"].weight.zero_()
        pooled: list[torch.Tensor] = []
        handle = layers[0].register_forward_pre_hook(lambda layer, x: pooled.append(x[0].mean(1)))
        for prompt in prompts[:4]:
            model.peft(input_ids=torch.tensor([prompt]), task_ids=torch.tensor([0]))
        handle.remove()
        layers[0].more_task["default"].weight.copy_(torch.cat(pooled))
    _, votes = infer_tasks(model, prompts[:4])
    counted = torch.tensor(votes)
    assert bool((counted.diagonal() >= 1).all())
    assert counted.sum() == 4 * 2, "each of two maps has one nearest task, the same for every routing"
    assert len(infer_tasks(model, prompts[:4], num_tasks=2)[1][0]) == 2


def test_evaluation_routes_by_what_was_found(place: Path) -> None:
    model, tasks = text_model("llama", NAMES), load_suite(place / "toy.yaml")
    always_one = mock.patch.object(answering, "infer_tasks", lambda _, prompts: ([1] * len(prompts), []))
    with always_one:
        found = toy_scores(model, tasks, 4, infer_task=True)
    told = evaluate_module.evaluate(
        model, tasks, toy_examples(tasks), task_ids=dict.fromkeys(NAMES, 1), batch_size=4, label=None
    )
    assert [r.records for r in found] == [r.records for r in told]
    assert {r.task: r.task_found for r in found} == {"accept": 0.0, "grade": 100.0, "choose": 0.0, "tell": 0.0}
    assert all(r.task_found is None for r in told)
    with always_one:  # a task that the adapter does not know has no right answer
        [unknown] = evaluate_module.evaluate(
            model, tasks[:1], toy_examples(tasks[:1]), task_ids={}, batch_size=4, infer_task=True, label=None
        )
    assert unknown.task_found is None
    assert unknown.n == 11


def test_the_standalone_runner_reports_the_accuracy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(place / "adapter"), "--tasks_file", str(place / "toy.yaml"), "--data_dir", str(place)]
    assert eval_run.main([*arguments, "--infer_task", "--output_dir", str(place / "out")]) == 0
    results = json.loads((place / "out" / "results.json").read_text())["results"]
    assert all(0 <= result["task_found"] <= 100 for result in results)
    assert "task_found" in capsys.readouterr().out
    assert eval_run.main([*arguments, "--infer_task", "--as_task", "accept"]) == 2
    assert "both say how examples are routed" in capsys.readouterr().err
    assert eval_run.main([str(place / "base"), *arguments[1:], "--infer_task"]) == 2
    assert "this model has none; use a MoRE adapter" in capsys.readouterr().err


def test_without_a_contrastive_loss_nothing_can_be_found() -> None:
    model, prompts = make("llama", {"contrastive_weight": 0.0})
    with pytest.raises(UserError, match="contrastive_weight 0"):
        infer_tasks(model, prompts)
