"""The benchmark's own arithmetic and its command; nothing here judges a time."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny_models import text_model
from toy_suite import toy_examples, write_toy

from more_ds.data.tokens import Tokens
from more_ds.speed.batches import count_tokens
from more_ds.speed.counting import kernels, peak_bytes
from more_ds.speed.inference import BASE, MIXED, work
from more_ds.speed.inference import model_of as inference_model
from more_ds.speed.profiling import BETWEEN, Operation, largest_differences, step_profile
from more_ds.speed.rounds import Ratio, compare
from more_ds.speed.scoring import score_speed, whole_seconds
from more_ds.speed.shapes import SHAPES, build, find_shape
from more_ds.speed.steps import REFERENCE, Setting, variants
from more_ds.tasks import load_suite

ROOT = Path(__file__).resolve().parents[1]


def test_a_ratio_is_of_times_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls: list[str] = []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name: str, seconds: float) -> None:
        # The machine slows down from round to round, for all variants alike: no ratio changes.
        clock[0] += seconds * (1 + calls.count(name)) ** 2
        calls.append(name)

    variants = {"a": lambda: work("a", 2.0), "b": lambda: work("b", 3.0)}
    found = compare(variants, "a", rounds=5)
    assert (found["b"].low, found["b"].median, found["b"].high) == (1.5, 1.5, 1.5)
    assert found["a"].median == 1.0
    assert found["a"].seconds == 2.0 * 16  # the median of rounds two to six
    assert sorted(calls) == ["a"] * 6 + ["b"] * 6
    assert {tuple(calls[at : at + 2]) for at in range(0, 12, 2)} == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_way_to_score_runs(kind: str, tmp_path: Path) -> None:
    tasks = [task for task in load_suite(write_toy(tmp_path) / "toy.yaml") if task.kind != "text"]
    model = text_model(kind, [task.name for task in tasks])
    found = score_speed(model, tasks, toy_examples(tasks, 5), batch_size=3, rounds=1)
    assert list(found) == [task.name for task in tasks]
    assert all(set(ratios) == {"likelihood", "generation", "published"} for ratios in found.values())


@pytest.fixture(scope="module")
def speed() -> Any:
    spec = importlib.util.spec_from_file_location("eval_speed", ROOT / "eval" / "speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_speed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scoring(
    speed: Any, tmp_path: Path, data_dir: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["scoring", "--model", str(models_dir / "stories260K"), "--data_dir", str(data_dir), "--rows", "3"]
    argv += ["--rounds", "1"]
    assert speed.main([*argv, "--tasks", "sst2", "--device", "cpu", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scoring.json").read_text())
    assert set(found["scoring"]["sst2"]) == {"likelihood", "generation", "published"}
    assert "sst2" in capsys.readouterr().out
    assert speed.main([*argv, "--suite", "nlg", "--tasks", "e2e_nlg"]) == 2
    assert "free text is always generated" in capsys.readouterr().err


def test_the_whole_suite_counts_every_task_as_often_as_it_has_rows() -> None:
    found = {
        "a": {"likelihood": Ratio(1, 1, 1, 2.0), "published": Ratio(4, 4, 4, 8.0)},
        "b": {"likelihood": Ratio(1, 1, 1, 1.0), "published": Ratio(2, 2, 2, 2.0)},
    }
    assert whole_seconds(found, {"a": 3.0, "b": 0.5}) == {"likelihood": 6.5, "published": 25.0}


def test_steps(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SHAPES["t5-256"], config=SHAPES["t5-256"].config | {"d_model": 16, "d_ff": 32, "num_layers": 1})
    monkeypatch.setitem(SHAPES, "t5-256", small)
    argv = ["step", "--shape", "t5-256", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert speed.main(argv) == 0
    costs = json.loads((tmp_path / "step.json").read_text())["step"]["t5-256"]
    # What an encoder-decoder cannot have, and what is made of finished adapters.
    assert set(variants()) - set(costs) <= {"prefix_tuning", "mole", "xlora", "attempt", "spot", "more triton"}
    assert costs["frozen base"]["trainable"] == 0
    assert costs["more fused"]["trainable"] == costs["more reference"]["trainable"]
    assert costs["more without gates"]["trainable"] == costs[REFERENCE]["trainable"]
    assert costs["more fused"]["kernels"] < costs["more reference"]["kernels"]
    assert costs["more fused"]["syncs"] == costs[REFERENCE]["syncs"]
    assert all(cost["peak_mb"] > 0 for cost in costs.values())
    assert (tmp_path / "step-t5-256.svg").is_file()


def test_checkpoint(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        SHAPES["llama-256"], config=SHAPES["llama-256"].config | {"hidden_size": 64, "num_hidden_layers": 1}
    )
    monkeypatch.setitem(SHAPES, "llama-256", small)
    argv = ["checkpoint", "--shape", "llama-256", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert run_ranks(lambda _: speed.main(argv), 1) == [0]
    found = json.loads((tmp_path / "checkpoint.json").read_text())["checkpoint"]
    parameters = sum(p.numel() for p in build(small, torch.float32, "cpu").parameters())
    assert found["llama-256"]["megabytes"] == pytest.approx(12e-6 * parameters, rel=0.01)
    assert all(found["llama-256"][name] > 0 for name in ("blocked", "written", "resume", "steps"))
    assert found["sampler, grouped by length"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]
    assert run_ranks(lambda _: speed.main([*argv, "--device", "cuda"]), 1) == [2]


def test_inference(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in (
        ("t5-256", {"d_model": 16, "d_ff": 32, "num_layers": 1}),
        ("llama-256", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}),
    ):
        monkeypatch.setitem(SHAPES, name, replace(SHAPES[name], config=SHAPES[name].config | sizes))
    assert speed.main(["inference", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "inference.json").read_text())["inference"]
    for parts in found.values():
        assert set(parts) == {"prefill", "decode"}
        assert set(parts["decode"]) == {REFERENCE, "base", "more, mixed tasks", "more, one task"}
    assert (tmp_path / "inference-decode-t5-256.svg").is_file()


@pytest.mark.parametrize("name", ["llama-256", "t5-256"])
def test_a_step_of_decoding_sends_less_than_a_loras(name: str) -> None:
    setting = Setting(SHAPES[name])
    sent = {}
    for variant in (REFERENCE, BASE, MIXED):
        model = inference_model(setting, variant)
        short, long = (kernels(work(setting, variant, model, 4, n)).sent for n in (1, 9))
        sent[variant] = (long - short) / 8
    assert sent[BASE] < sent[MIXED] < 0.8 * sent[REFERENCE]


def test_bad_input(speed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["step", "--shape", "llama-25"], "did you mean 'llama-256'"),
        (["step", "--variants", "more fuse"], "did you mean 'more fused'"),
        (["data"], "--model"),
        (["steps"], "invalid choice"),
    ):
        assert speed.main(argv) == 2
        assert words in capsys.readouterr().err


def test_a_known_shape_is_found_by_a_short_name() -> None:
    assert find_shape("llama2-7b").config["hidden_size"] == 4096


def test_kernels_and_memory() -> None:
    a = torch.randn(1000, 1000)
    assert kernels(lambda: (a @ a).view(-1).sum().item()).sent == 2
    assert kernels(lambda: (a @ a).sum().item()).asked == 1
    assert peak_bytes(lambda: (a @ a) @ a) == pytest.approx(8e6, rel=0.01)


def test_grouping_computes_fewer_tokens() -> None:
    lengths = np.random.RandomState(0).randint(5, 100, 3000)
    ends = np.cumsum(np.stack([lengths - 2, np.full_like(lengths, 2)], 1).ravel())
    tokens = Tokens(np.zeros(int(ends[-1]), np.int32), ends, lengths.astype(np.int32), 0)
    found = count_tokens([tokens], strategy="uniform", micro=8, groups=2, steps=60, fixed=128)
    assert found.fixed == 16 * 128
    assert found.real < found.grouped < found.dynamic < found.fixed
    assert found.grouped < 1.1 * found.real


def test_a_profile_is_of_one_step() -> None:
    shape = replace(SHAPES["llama-128-launch"], rows=1, length=8)
    found = step_profile(Setting(shape, tasks=2), [REFERENCE, "more fused"], steps=2)
    linear = len(build(shape, torch.float32, "cpu").model.layers) * 7
    assert found[REFERENCE]["aten::mm"].calls >= 3 * linear  # base and both factors, forward alone
    assert all(own[BETWEEN].milliseconds > 0 for own in found.values())
    assert "SharedInput" in found["more fused"]
    assert "SharedInput" not in found[REFERENCE]


def test_the_largest_differences_come_first() -> None:
    found = {
        "a": {"x": Operation(5, 1), "y": Operation(1, 1), "gone": Operation(3, 1)},
        "b": {"x": Operation(6, 1), "y": Operation(1, 2), "new": Operation(2, 1)},
    }
    assert largest_differences(found, "a", "b", 3) == ["new", "x", "gone"]


@pytest.mark.parametrize("device", ["cuda:99", "cuda0", "gpu"])
def test_a_device_that_is_not_there_is_one_line(speed: Any, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["step", "--device", device]) == 2
    assert f"error: --device {device}: torch sees " in capsys.readouterr().err


@pytest.mark.slow
def test_growth(speed: Any, tmp_path: Path) -> None:
    argv = ["growth", "--shape", "llama-128-launch", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert speed.main(argv) == 0
    found = json.loads((tmp_path / "growth.json").read_text())["growth"]["llama-128-launch"]
    assert set(found) == {"depth", "width", "rank", "tasks", "rows", "length"}
    peaks = [[one["peak_mb"] for one in own.values()] for own in found.values()]
    assert all(own == sorted(own) for own in peaks), "more of anything takes no less memory"
    assert all(one["time"]["median"] > 0 for own in found.values() for one in own.values())
    assert (tmp_path / "growth-llama-128-launch.svg").is_file()
