"""Single-task baselines by one command: a run for each task, or one adapter that goes from task to task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_methods_peft import place

from eval import run as eval_run
from launch import single, train
from more_ds.errors import TrainingError
from more_ds.results import read_predictions, read_results

__all__ = ["place"]

NAMES = ["parity", "copy", "grade"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be started; the training command runs in a fork of the test, as its imports take seconds."""
    seen: list[list[str]] = []

    def run(command: Sequence[str]) -> None:
        seen.append(list(command))
        scripts = {"train.py": train.main, "run.py": eval_run.main}
        at, main = next((i, scripts[Path(w).name]) for i, w in enumerate(command) if Path(w).name in scripts)
        if main is eval_run.main:
            assert main(list(command[at + 1 :])) == 0
        elif run_ranks(lambda _: main(list(command[at + 1 :])), 1) != [0]:
            raise TrainingError("it failed")

    monkeypatch.setattr(single, "_run", run)
    return seen


def flags(place: Path, output: Path, *extra: str) -> list[str]:
    recipe = ["--recipe", str(place / "recipe.yaml"), "--model", str(place / "llama"), "--method", "lora"]
    return [*recipe, "--test", "true", "--output_dir", str(output), *extra]


def test_every_task_gets_a_run_and_the_scores_are_together(
    place: Path, tmp_path: Path, commands: list[list[str]]
) -> None:
    assert single.main(flags(place, tmp_path / "single", "--tasks", "parity,grade")) == 0
    _, results = read_results(tmp_path / "single" / "eval" / "test")
    assert [result.task for result in results] == ["parity", "grade"]
    assert len(read_predictions(tmp_path / "single" / "eval" / "test")) == sum(result.n for result in results)
    for name in ("parity", "grade"):
        config = json.loads((tmp_path / "single" / name / "config.json").read_text())
        assert config["tasks"] == [name]
        assert config["method"] == "lora"
    count = len(commands)
    assert single.main(flags(place, tmp_path / "single", "--tasks", "parity,grade")) == 0
    assert len(commands) == count, "what is finished is not trained again"


@pytest.mark.slow
def test_a_chain_goes_on_from_adapter_to_adapter(place: Path, tmp_path: Path, commands: list[list[str]]) -> None:
    chain = tmp_path / "chain"
    options = ["--sequential", "--learning_rate=1e-30", "--tasks=parity,copy"]
    assert single.main(flags(place, chain, *options)) == 0
    first, second = (
        load_file(chain / name / "best" / "adapter_model.safetensors") for name in ("01-parity", "02-copy")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-20)
    assert {result.task for result in read_results(chain / "eval" / "test")[1]} == {"parity", "copy"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "copy"], "there is one task, copy"),
        (["--sequential", "--method", "more"], "more does not go from task to task"),
        (["--test", "false"], "leave --test out"),
        (["--learning_rates", "1"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, tmp_path: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert single.main(flags(place, tmp_path / "runs", *extra)) == 2
    assert message in capfd.readouterr().err


def test_a_run_that_fails_ends_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match="exit code 3"):
        single._run(["python3", "-c", "raise SystemExit(3)"])
