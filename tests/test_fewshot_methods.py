"""Few-shot transfer of every method but MoRE: what it starts as, what it trains, and that ranks change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from test_half_precision import PROMPTS, sources
from test_methods_peft import argv, place
from test_training import DS_CONFIGS

from launch import train, transfer
from more_ds.engine import Ranks
from more_ds.losses import label_nll
from more_ds.methods import METHODS

__all__ = ["place", "sources"]

FAST = ("lora", "moelora", "full")
MADE_OF_OTHERS = ("mole", "xlora", "attempt", "spot")
OTHERS = [m for m in METHODS if m not in ("more", "p_tuning")]
SUITE = """
suite: fresh
tasks:
  fresh:
    files: {train: copy.jsonl, test: copy.jsonl}
    prompt: "fresh: {text}"
    labels: {0: bad, 1: good}
    metrics: [accuracy]
"""


@pytest.fixture(scope="module")
def runs(place: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    """A trained run of a method, made when it is asked for, and what it is made of with it."""
    (place / "fresh.yaml").write_text(SUITE)

    class Runs(dict[str, Path]):
        def __missing__(self, method: str) -> Path:
            self[method] = place / f"run-{method}"
            options = request.getfixturevalue("sources")[method] if method in MADE_OF_OTHERS else []
            options = [*options, *(["--adapter.num_virtual_tokens", "3"] if method in PROMPTS else [])]
            if method in PROMPTS:
                options += ["--tasks", "copy"] if method != "mpt" else []
            arguments = argv(place, method, *options, "--max_steps", "8", "--output_dir", str(self[method]))
            assert run_ranks(lambda _: train.main(arguments), 1) == [0]
            return self[method]

    return Runs()


def flags(place: Path, run: Path, output: str, *extra: str) -> list[str]:
    return [
        str(run), "--task", "fresh/fresh", "--tasks_file", str(place / "fresh.yaml"), "--data_dir", str(place),
        "--shots", "2", "--seeds", "1", "--max_steps", "4", "--learning_rate", "0.02", "--train_batch_size", "4",
        "--per_device_train_batch_size", "2", "--batch_size", "3", "--output_dir", str(place / output), *extra,
    ]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in OTHERS])
def test_a_method_learns_a_task_on_two_ranks_as_on_one(place: Path, runs: dict[str, Path], method: str) -> None:
    run = runs[method]
    assert run_ranks(lambda _: transfer.main(flags(place, run, f"shots-{method}-1")), 1) == [0]
    two = flags(place, run, f"shots-{method}-2", "--ds_config", str(DS_CONFIGS / "zero2.json"))
    assert run_ranks(lambda _: transfer.main(two), 2) == [0, 0]
    [a], [b] = (results(place / f"shots-{method}-{n}")["draws"] for n in (1, 2))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    assert a["loss"][-1] < a["loss"][0]
    if METHODS[method].routes_by_task:
        assert sum(a["votes"].values()) == 4, "two shots of each class"
        assert a["init_from"] == max(("parity", "copy", "grade"), key=lambda name: a["votes"].get(name, 0))
    else:
        assert (a["init_from"], a["votes"]) == (None, {})


def starts(arguments: list[str]) -> tuple[list[int], list[int]]:
    """By shot, the task that is chosen, and the one with the lowest loss for each shot alone."""
    parsed = transfer._parser().parse_args(arguments)
    ranks = Ranks()
    ranks.connect()
    plan = transfer._plan(parsed, ranks)
    few_shot = transfer._load(parsed, plan, ranks)
    model, shots = few_shot.text_model, plan.draws[2, 0]
    with torch.no_grad():  # far apart, so that the answers' likelihoods differ
        for name, parameter in model.peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (3.0 if "task" in name else 0.3))
    best = []
    with model.evaluating():
        for shot in shots:
            prompt, answer = model.encoder.prompt(shot.prompt), model.encoder.target(shot.target)
            batches = [model.collator.answers([prompt], [answer], [task]) for task in range(3)]
            losses = [float(label_nll(model.label_logits(batch), batch["labels"])[0]) for batch in batches]
            best.append(losses.index(min(losses)))
    return few_shot._by_answer(shots), best


def test_the_start_is_the_task_as_which_the_answers_are_likeliest(place: Path, runs: dict[str, Path]) -> None:
    arguments = flags(place, runs["moelora"], "votes")
    [(chosen, best)] = run_ranks(lambda _: starts(arguments), 1)
    assert chosen == best
    assert len(set(best)) > 1, "the tasks are told apart"


@pytest.mark.parametrize(
    ("method", "extra", "message"),
    [
        ("lora", ["--train", "embedding"], "only a MoRE has an embedding of its own for a task; use --train all"),
        ("lora", ["--init_from", "copy"], "does not route by task, so there is none to start as; leave it out"),
        ("moelora", ["--init_from", "cpy"], "--init_from: unknown task 'cpy'; did you mean 'copy'"),
        ("p_tuning", [], "holds what its prompt's encoder wrote, and not the encoder; transfer another run"),
        ("full", ["--save_adapters"], "there is no adapter; leave it out"),
    ],
)
def test_mistakes(
    place: Path, runs: dict[str, Path], method: str, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runs[method]
    capfd.readouterr()
    assert transfer.main(flags(place, run, "wrong", *extra)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_model_that_nobody_trained_is_refused(
    place: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert runs["lora"]
    capfd.readouterr()
    assert transfer.main(flags(place, place / "llama", "wrong")) == 2
    assert "is no run and no adapter; train one first" in capfd.readouterr().err
