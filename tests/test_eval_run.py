"""The standalone runner: what it opens, what it refuses, and the numbers it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import text_model
from toy_suite import IDS, NAMES, copy_adapter, on_ranks, toy_row, write_toy

from more_ds.errors import UserError
from more_ds.evaluate import evaluate
from more_ds.loading import find_subject, load_text_model
from more_ds.scoring import answering
from more_ds.scoring.likelihood import rank_options
from more_ds.tasks import Task, load_suite
from more_ds.tasks.render import render

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    return folder / "adapter"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_run", ROOT / "eval" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(folder: Path) -> list[Task]:
    return load_suite(folder / "toy.yaml")


def test_an_adapter_loads_whole(folder: Path, adapter: Path) -> None:
    subject = find_subject(str(adapter))
    assert subject.task_ids == IDS
    model = load_text_model(subject, dtype="fp32", device="cpu", max_source_length=64, max_target_length=32)
    original = text_model("llama", NAMES)
    prompts, options = [[2, 9, 30]], [[[40, 41, 1], [50, 1]]]
    for task in range(4):
        found = rank_options(model, prompts, [task], options)[0]
        assert found == pytest.approx(rank_options(original, prompts, [task], options)[0], abs=1e-5)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in sorted(tensors) if "more_B" in key)]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.more_B.weight"] = torch.ones(2)


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in sorted(tensors) if "more_A" in key)
    tensors[key] = torch.cat([tensors[key]] * 2)


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(key for key in sorted(tensors) if "more_B" in key)].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks 1 tensors of this adapter, e\.g\. .*more_B"),
        (_rename, r"holds 1 tensors that the adapter does not have, e\.g\. .*layers\.7"),
        (_widen, r"does not fit the base model"),
        (_spoil, r"1 tensors are not finite"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter: Path, tmp_path: Path, change: Any, message: str) -> None:
    subject = find_subject(str(copy_adapter(adapter, tmp_path / "a", change)))
    with pytest.raises(UserError, match=message):
        load_text_model(subject, dtype="fp32", device="cpu", max_source_length=64, max_target_length=32)


def test_an_adapter_that_changes_nothing_is_named(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def clear(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in tensors.items():
            if "more_B" in key:
                value.zero_()

    for name, change in (("same", lambda tensors: None), ("zero", clear)):
        subject = find_subject(str(copy_adapter(adapter, tmp_path / name, change)))
        load_text_model(subject, dtype="fp32", device="cpu", max_source_length=8, max_target_length=8)
        assert ("changes nothing" in capsys.readouterr().out) == (name == "zero")


def test_a_cut_file_is_refused(adapter: Path, tmp_path: Path) -> None:
    path = copy_adapter(adapter, tmp_path / "a", lambda tensors: None)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match="is damaged"):
        load_text_model(find_subject(str(path)), dtype="fp32", device="cpu", max_source_length=8, max_target_length=8)


@pytest.fixture
def run_folder(folder: Path, adapter: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for slot in ("best", "last"):
        copy_adapter(adapter, run / slot, lambda tensors: None)
    config = {
        "model": str(folder / "base"), "suite": [], "tasks": NAMES, "tasks_file": str(folder / "toy.yaml"),
        "data_dir": str(folder), "max_source_length": 64, "max_target_length": 32, "plain_prompts": False,
        "dtype": "auto", "revision": None, "quantization": "none", "attn_implementation": None,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    return run


def read_results(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "results.json").read_text())["results"]


def test_runner_on_a_run_folder(
    runner: ModuleType, run_folder: Path, tasks: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        runner.main([str(run_folder), "--mode", "both", "--batch-size", "5", "--device", "cpu", "--local_rank=0"]) == 0
    )
    output = capsys.readouterr().out
    assert output.startswith(f"adapter {run_folder}/best on ")
    found = read_results(run_folder / "eval" / "tasks-test")
    assert [(entry["task"], entry["split"], entry["mode"]) for entry in found] == [
        ("accept", "test", "likelihood"), ("grade", "test", "likelihood"), ("choose", "test", "likelihood"),
        ("tell", "test", "generation"), ("accept", "test_hard", "likelihood"), ("accept", "test", "generation"),
        ("grade", "test", "generation"), ("choose", "test", "generation"), ("accept", "test_hard", "generation"),
    ]  # fmt: skip
    assert found[0]["majority"]["accuracy"] > 0
    examples = {t.name: [render(t, toy_row(t.name, i + 4), i) for i in range(11)] for t in tasks}
    expected = evaluate(text_model("llama", NAMES), tasks, examples, task_ids=IDS, batch_size=3, label=None)
    assert [entry["metrics"] for entry in found[:4]] == [result.metrics for result in expected]
    assert f"{found[0]['metrics']['matthews']:.2f}" in output


def test_runner_on_two_ranks(runner: ModuleType, run_folder: Path) -> None:
    argv = [str(run_folder), "--device", "cpu", "--batch_size", "3", "--output_dir"]
    assert runner.main([*argv, str(run_folder / "one")]) == 0
    assert on_ranks(2, lambda rank: runner.main([*argv, str(run_folder / "two")])) == [0, 0]
    assert read_results(run_folder / "one") == read_results(run_folder / "two")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    runner: ModuleType, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(run_folder), "--device", "cpu", "--batch_size", "4", "--mode", "both", "--output_dir"]
    assert runner.main([*argv, str(run_folder / "whole")]) == 0
    answered: list[int] = []
    limit = 5

    def counted(function: Any) -> Any:
        def call(model: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
            if len(answered) == limit:
                raise KeyboardInterrupt
            answered.append(len(prompts))
            return function(model, prompts, *arguments, **options)

        return call

    for name in ("rank_options", "generate"):
        monkeypatch.setattr(f"more_ds.scoring.answering.{name}", counted(getattr(answering, name)))
    with pytest.raises(KeyboardInterrupt):
        runner.main([*argv, str(run_folder / "parts")])
    first = sum(answered)
    limit = 1000
    capsys.readouterr()
    assert runner.main([*argv, str(run_folder / "parts")]) == 0
    assert f"{first} answers of an interrupted evaluation are taken over" in capsys.readouterr().out
    assert sum(answered) == sum(entry["n"] for entry in read_results(run_folder / "whole"))
    records = [(run_folder / name / "predictions.jsonl").read_bytes() for name in ("parts", "whole")]
    assert records[0] == records[1]
    assert read_results(run_folder / "parts") == read_results(run_folder / "whole")
    assert not list((run_folder / "parts").glob("answers-*"))


def test_runner_on_a_plain_model_and_as_task(
    runner: ModuleType, folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tail = ["--tasks_file", str(folder / "toy.yaml"), "--tasks", "accept", "--data_dir", str(folder), "--limit", "6"]
    tail += ["--device", "cpu", "--max_source_length", "64"]
    assert runner.main([str(folder / "base"), *tail]) == 0
    assert read_results(tmp_path / "eval_results" / "base" / "accept-toy-test")[0]["n"] == 6
    scores = {}
    for name in ("accept", "grade"):
        assert runner.main([str(adapter), *tail, "--as_task", name, "--output_dir", str(tmp_path / name)]) == 0
        scores[name] = json.loads((tmp_path / name / "predictions.jsonl").read_text().splitlines()[0])["scores"]
    assert scores["accept"] != pytest.approx(scores["grade"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: RUN"),
        (["{base}"], "records no tasks; say what to score"),
        (["{base}", "--suites", "glue"], "unknown argument '--suites'; did you mean 'suite'?"),
        (["{base}", "--suite", "gleu"], "unknown suite 'gleu'; did you mean 'glue'?"),
        (["{base}", "--limit", "0"], "'0' is not a positive number"),
        (["{base}", "--tasks_file", "{toy}", "--data_dir", "{base}/none"], "no folder"),
        (["{base}", "--tasks_file", "{toy}", "--data_dir", "{data}", "--split", "tset"], "did you mean 'test'"),
        (["{data}/nowhere", "--tasks_file", "{toy}", "--data_dir", "{data}"], "no model at"),
        (["{adapter}", "--tasks", "cola"], "the adapter does not know 'cola'; it knows: accept, grade, choose, tell"),
        (["{adapter}", "--tasks", "cola", "--as_task", "acept"], "did you mean 'accept'"),
        (["{run}"], "holds no adapter"),
    ],
)
def test_runner_refuses_in_one_line(
    runner: ModuleType, folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "suite": [], "tasks": []}))
    places = {"base": folder / "base", "toy": folder / "toy.yaml", "data": folder, "adapter": adapter, "run": tmp_path}
    assert runner.main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
