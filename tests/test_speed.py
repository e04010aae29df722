"""The benchmark's own arithmetic and its command; nothing here judges a time."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from tiny_models import text_model
from toy_suite import toy_examples, write_toy

from more_ds.speed.rounds import compare
from more_ds.speed.scoring import score_speed
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


def test_the_command(tmp_path: Path, data_dir: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("eval_speed", ROOT / "eval" / "speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_speed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--model", str(models_dir / "stories260K"), "--data_dir", str(data_dir), "--rows", "3", "--rounds", "1"]
    output = tmp_path / "speed.json"
    assert module.main([*argv, "--tasks", "sst2", "--device", "cpu", "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())["scoring"]["sst2"]) == {"likelihood", "generation", "published"}
    assert "sst2" in capsys.readouterr().out
    assert module.main([*argv, "--suite", "nlg", "--tasks", "e2e_nlg"]) == 2
    assert "free text is always generated" in capsys.readouterr().err
