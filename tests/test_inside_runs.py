"""What a run notes of its gates and of its tasks' gradients, and that looking changes nothing."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import base_model, text_model, tokenizer

from launch import train
from more_ds import MoreConfig
from more_ds.engine import Ranks
from more_ds.gates import gate_entropy, gate_row
from more_ds.gradients import task_gradients
from more_ds.log import numbers
from more_ds.losses import label_nll
from more_ds.run_folder import RunFolder
from more_ds.tasks.render import Example

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
NAMES = ["one", "two", "three"]
TASKS = """
tasks:
  one: {files: {train: a.jsonl, validation: a.jsonl}, prompt: "one: {text}", labels: {0: x, 1: y}, metrics: [accuracy]}
  two: {files: {train: a.jsonl, validation: a.jsonl}, prompt: "two: {text}", target: "{text}", metrics: [exact_match]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inside")
    base_model("llama").save_pretrained(folder / "llama")
    tokenizer(False).save_pretrained(folder / "llama")
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("ab", k=draw.randint(2, 6))), "label": i % 2} for i in range(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS)
    settings = {
        "model": str(folder / "llama"), "tasks_file": str(folder / "tasks.yaml"), "train_batch_size": 4,
        "per_device_train_batch_size": 2, "max_steps": 4, "warmup_steps": 1, "learning_rate": 0.03, "eval_steps": 2,
        "eval_limit": 4, "test": False, "max_source_length": 32, "max_target_length": 16,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder


def run(place: Path, name: str, *extra: str, world: int = 1) -> Path:
    arguments = ["--recipe", str(place / "recipe.yaml"), "--output_dir", str(place / name), *extra]
    arguments += [] if "--ds_config" in extra else ["--ds_config", str(DS_CONFIGS / "zero2.json")]
    assert run_ranks(lambda _: train.main(arguments), world) == [0] * world
    return place / name


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in row]


ADAPTERS = {"more": "4", "smora": "8", "dylora": "4"}


@pytest.mark.parametrize(("method", "world"), [("more", 2), ("smora", 1), ("dylora", 1)])
def test_measuring_gradients_changes_no_byte_of_the_training(place: Path, method: str, world: int) -> None:
    extra = ["--method", method, "--adapter.r", ADAPTERS[method], "--adapter.lora_dropout", "0.1"]
    plain = run(place, f"{method}-plain", *extra, world=world)
    watched = run(place, f"{method}-watched", *extra, "--gradient_cosine", world=world)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        kept = [folder / "checkpoints" / "step-00000004" / name for folder in (plain, watched)]
        assert kept[0].read_bytes() == kept[1].read_bytes()
    assert not rows(plain, "gradients")
    found = rows(watched, "gradients")
    assert [row["step"] for row in found] == [0, 2, 4]
    assert all(row["gradients"]["norm"].keys() == {"one", "two"} for row in found)
    assert all(-1 <= row["gradients"]["cosine"]["one"]["two"] <= 1 for row in found)


def test_gradients_equal_those_of_plain_backward_passes() -> None:
    model = text_model("llama", NAMES, lora_dropout=0.0)
    examples = [[Example(name, i, f"{name} {i}", "b" * (1 + i), (), i) for i in range(3)] for name in NAMES]
    expected = []
    model.module.train()
    for task, own in enumerate(examples):
        prompts, targets = ([encode(text) for text in texts] for encode, texts in (
            (model.encoder.prompt, [row.prompt for row in own[:2]]),
            (model.encoder.target, [row.target for row in own[:2]]),
        ))  # fmt: skip
        batch = model.collator.answers(prompts, targets, [task] * 2)
        nll, tokens = label_nll(model.label_logits(batch), batch["labels"])
        model.module.zero_grad()
        (nll.sum() / tokens.sum()).backward()
        flat = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                for p in model.module.parameters() if p.requires_grad]  # fmt: skip
        expected.append(torch.cat(flat).double())
    model.module.zero_grad()
    model.module.eval()
    [found] = run_ranks(lambda ranks: task_gradients(model, examples, NAMES, micro=2, ranks=ranks, seed=0), 1)
    assert found["norm"] == pytest.approx({n: float(g.norm()) for n, g in zip(NAMES, expected, strict=True)})
    cosine = torch.nn.functional.cosine_similarity
    for i, one in enumerate(NAMES):
        for j in range(i + 1, 3):
            assert found["cosine"][one][NAMES[j]] == pytest.approx(
                float(cosine(expected[i], expected[j], dim=0)), abs=1e-5
            )
    assert "three" not in found["cosine"]
    assert len({round(value, 3) for part in found["cosine"].values() for value in part.values()}) > 1


def test_two_ranks_measure_the_mean_over_both_their_rows() -> None:
    model = text_model("llama", NAMES[:2], lora_dropout=0.0)
    examples = [[Example(name, i, f"{name} {i}", "b" * (1 + i), (), i) for i in range(4)] for name in NAMES[:2]]

    def measure(micro: int) -> Any:
        def on_rank(ranks: Ranks) -> dict[str, Any]:
            return task_gradients(model, examples, NAMES[:2], micro=micro, ranks=ranks, seed=0)

        return on_rank

    [whole] = run_ranks(measure(4), 1)
    first, second = run_ranks(measure(2), 2)
    assert first == second
    assert first["norm"] == pytest.approx(whole["norm"])
    assert first["cosine"]["one"] == pytest.approx(whole["cosine"]["one"])


def test_zero_3_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", str(place / "recipe.yaml"), "--ds_config", str(DS_CONFIGS / "zero3.json")]
    assert train.main([*arguments, "--gradient_cosine"]) == 2
    assert "not ZeRO-3; use a ds_config with ZeRO-2" in capfd.readouterr().err


def test_entropy_runs_from_zero_to_log_r() -> None:
    model: Any = get_peft_model(base_model("llama"), MoreConfig(r=4, num_tasks=2, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "more_gate" in name and "weight" in name:
            torch.nn.init.zeros_(parameter)
    entropy = gate_entropy(model)
    assert len(entropy) == 14
    for values in entropy.values():
        assert values.tolist() == pytest.approx([math.log(4)] * 2)
    for name, parameter in model.named_parameters():
        if "more_gate" in name and "bias" in name:
            torch.nn.init.constant_(parameter[0:1], 200.0)
    assert all(values.tolist() == [0.0, 0.0] for values in gate_entropy(model).values())


def test_a_method_without_gates_has_no_entropy() -> None:
    assert gate_entropy(base_model("llama")) == {}
    pooled = get_peft_model(
        base_model("llama"), MoreConfig(r=4, num_tasks=2, gate_input="pooled", task_type="CAUSAL_LM")
    )
    assert gate_entropy(pooled) == {}


def test_a_row_of_gates_by_hand() -> None:
    ranks = {"a": torch.tensor([1, 4, 4]), "b": torch.tensor([2, 2, 2])}
    row = gate_row(ranks, {"a": torch.tensor([0.0, 1.0, 0.5]), "b": torch.tensor([1.0, 1.0, 0.5])}, NAMES)
    assert row["ranks"] == {"a": [1, 4, 4], "b": [2, 2, 2]}
    assert row["mean_rank"] == {"one": 1.5, "two": 3.0, "three": 3.0}
    assert row["mean_entropy"] == {"one": 0.5, "two": 1.0, "three": 0.5}
    assert row["distinct_ranks"] == 1.5


def test_the_run_notes_its_gates_and_tells_the_monitors(place: Path) -> None:
    folder = run(place, "gates", "--report_to", "tensorboard")
    found = rows(folder, "gates")
    assert [row["step"] for row in found] == [0, 2, 4]
    ranks = found[0]["gates"]["ranks"]
    assert len(ranks) == 14
    assert all(len(chosen) == 2 and min(chosen) >= 1 and max(chosen) <= 8 for chosen in ranks.values())
    curves = dict(numbers({"gates": found[-1]["gates"]}))
    assert curves.keys() == {"train/gates/distinct_ranks"} | {
        f"train/gates/{what}/{task}" for what in ("mean_rank", "mean_entropy") for task in ("one", "two")
    }
    events = EventAccumulator(str(folder / "monitors" / "tensorboard"))
    events.Reload()
    assert curves.keys() <= set(events.Tags()["scalars"])
    last = events.Scalars("train/gates/mean_rank/one")[-1]
    assert (last.step, last.value) == (4, pytest.approx(found[-1]["gates"]["mean_rank"]["one"]))
    facts = json.loads((folder / "plan.json").read_text())
    assert facts["tasks"]["two"] == {"suite": "tasks", "metric": "exact_match", "rows": 12, "validation": 4,
                                     "share": 0.5}  # fmt: skip
    parts = [row["tasks"]["one"] for row in rows(folder, "loss") if "one" in row["tasks"]]
    # An answer is a space, a letter and EOS.
    assert all(part["label_tokens"] == 3 * part["examples"] < part["tokens"] for part in parts)


WANDB = """
import json, os, pathlib
def init(**options): note(options)
def log(data, step=None, commit=None): note([step, *data])
def note(value):
    with open(pathlib.Path(os.environ["WANDB_DIR"]) / "seen.jsonl", "a") as file:
        file.write(json.dumps(value) + "\\n")
"""


def test_wandb_is_told_in_the_order_of_steps(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops what comes with a step below the last one's."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    folder = run(place, "wandb", "--report_to", "wandb,csv")
    begun, *seen = [json.loads(line) for line in (folder / "monitors" / "seen.jsonl").read_text().splitlines()]
    assert begun["project"] == "more_ds"
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    noted = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["step"] <= 4]
    assert set(steps) == {row["step"] for row in noted}
    assert {"train/loss", "train/learning_rate", "train/gates/distinct_ranks"} <= {name for _, name in seen}


def test_a_monitor_that_is_not_there_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--recipe", str(place / "recipe.yaml"), "--output_dir", str(place / "none"), "--report_to", "wandb"]
    assert train.main(arguments) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_a_run_that_begins_anew_forgets_its_first_try(place: Path) -> None:
    folder = RunFolder(place / "anew")
    folder.path.mkdir()
    folder.log({"step": 3, "loss": 1.0})
    folder.forget_after(-1)
    assert folder.metrics.read_text() == ""
