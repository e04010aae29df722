"""The training command as a whole: ranks, ZeRO stages, accumulation, resume, and what it leaves behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from tiny_models import base_model, tokenizer

from eval import run as eval_run
from launch import train
from more_ds.run import Run

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
TASKS = """
tasks:
  parity:
    files: {train: parity.jsonl, validation: parity.jsonl, test: parity.jsonl}
    prompt: "parity: {text}"
    labels: {0: even, 1: odd}
    metrics: [accuracy, f1]
  copy:
    files: {train: copy.jsonl, validation: copy.jsonl, test: copy.jsonl}
    prompt: "copy: {text}"
    target: "{text}"
    metrics: [exact_match]
  grade:
    files: {train: grade.jsonl, validation: grade.jsonl, test: grade.jsonl}
    prompt: "grade: {text}"
    labels: {range: [0.0, 2.0, 1.0]}
    metrics: [pearson]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of both kinds and a user's own tasks of uneven sizes."""
    folder = tmp_path_factory.mktemp("training")
    for kind in ("llama", "t5"):
        base_model(kind).save_pretrained(folder / kind)
        tokenizer(kind == "t5").save_pretrained(folder / kind)
    draw = random.Random(0)
    for name, size in (("parity", 40), ("copy", 17), ("grade", 9)):
        texts = ["".join(draw.choices("ab", k=draw.randint(2, 9))) for _ in range(size)]
        rows = [{"text": text, "label": text.count("a") % (2 if name == "parity" else 3)} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS)
    return folder


def argv(place: Path, output: Path, *extra: str, model: str = "llama", ds_config: str = "zero2") -> list[str]:
    return [
        "--recipe", str(recipe(place)), "--model", str(place / model), "--output_dir", str(output),
        "--ds_config", ds_config if ds_config.endswith(".json") else str(DS_CONFIGS / f"{ds_config}.json"), *extra,
    ]  # fmt: skip


def recipe(place: Path) -> Path:
    path = place / "recipe.yaml"
    settings = {
        "tasks_file": str(place / "tasks.yaml"), "train_batch_size": 8, "per_device_train_batch_size": 2,
        "max_steps": 6, "warmup_steps": 2, "learning_rate": 0.01, "eval_steps": 3, "logging_steps": 1,
        # Adam divides a gradient by its own size: a wide epsilon keeps it from blowing up the rounding of tiny ones.
        "adam_epsilon": 1e-3,
        "eval_limit": 6, "eval_on_start": False, "max_source_length": 32, "max_target_length": 16,
        "adapter": {"r": 4, "lora_dropout": 0.1},
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    return path


def on_ranks(world: int, arguments: list[str]) -> None:
    assert run_ranks(lambda _: train.main(arguments), world) == [0] * world


def losses(output: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def adapter(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / name / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a["step"] == b["step"]
        for key in ("loss_lm", "loss_auxiliary", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance)
        assert a["tasks"].keys() == b["tasks"].keys()
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def one_process(place: Path) -> Path:
    """The reference: one process, no sharding, four micro-batches a step."""
    output = place / "one"
    # All rows are scored, as the standalone evaluation does.
    on_ranks(1, argv(place, output, "--eval_limit", "none", ds_config=str(zero_stage_file(place, 0))))
    return output


def zero_stage_file(place: Path, stage: int, **options: object) -> Path:
    path = place / f"stage{stage}{len(options)}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **options}, "bf16": {"enabled": "auto"}}))
    return path


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_on_different_tasks_equal_one_process(place: Path, one_process: Path, stage: int) -> None:
    output = place / f"two-{stage}"
    # A threshold of 0 makes ZeRO-3 partition the adapters too, which the shipped configuration keeps whole.
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    on_ranks(2, argv(place, output, ds_config=str(zero_stage_file(place, stage, **options))))
    tasks = [len(row["tasks"]) for row in losses(output)]
    assert max(tasks) > 1, "no step had ranks on different tasks"
    assert_same_run(one_process, output)
    whole, parts = (losses(run)[-1]["memory_gb"] for run in (one_process, output))
    assert [len(parts[kind]) for kind in ("held", "peak", "parameters")] == [2, 2, 2]
    assert all(0 < parameters < peak for parameters, peak in zip(parts["parameters"], parts["peak"], strict=True))
    share = sum(parts["parameters"]) / whole["parameters"][0]
    assert share == pytest.approx(1.0 if stage == 3 else 2.0, rel=0.05)


@pytest.mark.parametrize(
    "ds_config", ["zero2_offload", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "zero3_offload"))]
)
def test_shipped_configurations_equal_one_process(place: Path, one_process: Path, ds_config: str) -> None:
    output = place / ds_config
    on_ranks(2, argv(place, output, ds_config=ds_config))
    assert_same_run(one_process, output)


def test_accumulation_changes_nothing(place: Path) -> None:
    """4 x 2 rows and 1 x 8 rows are one batch, though the micro-batches have unequal numbers of label tokens."""
    for name, micro in (("wide", "8"), ("narrow", "2")):
        extra = ["--per_device_train_batch_size", micro, "--sampling_scope", "step", "--adapter.lora_dropout", "0"]
        on_ranks(1, argv(place, place / name, *extra))
    assert_same_run(place / "wide", place / "narrow")


def test_t5_trains_alike_on_one_and_two_ranks(place: Path) -> None:
    for world in (1, 2):
        on_ranks(world, argv(place, place / f"t5-{world}", model="t5", ds_config="zero3" if world == 2 else "zero2"))
    assert_same_run(place / "t5-1", place / "t5-2")


def stop_after_the_first_checkpoint() -> Any:
    original = Run.save

    def save(run: Run) -> None:
        original(run)
        raise KeyboardInterrupt

    return mock.patch.object(Run, "save", save)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (2, "fp32"),
        (3, "fp32"),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    place: Path, stage: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORE_DS_CACHE", str(place / "cache"))
    whole, cut = place / f"whole-{stage}-{dtype}", place / f"cut-{stage}-{dtype}"
    ds_config = str(zero_stage_file(place, stage))
    extra = ["--dtype", dtype, "--test", "false", "--group_by_length", "true" if stage == 2 else "false"]
    on_ranks(2, argv(place, whole, *extra, ds_config=ds_config))
    with stop_after_the_first_checkpoint(), pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        on_ranks(2, argv(place, cut, *extra, ds_config=ds_config))
    assert len(losses(cut)) == 3
    on_ranks(2, argv(place, cut, *extra, "--resume", "auto", ds_config=ds_config))
    for name in ("last/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    keys = ("step", "loss_lm", "grad_norm", "learning_rate")
    assert [[row[k] for k in keys] for row in losses(whole)] == [[row[k] for k in keys] for row in losses(cut)]
    assert all(0 <= row["padding"] < 1 for row in losses(whole))


def test_a_run_goes_on_with_another_number_of_ranks(place: Path, one_process: Path) -> None:
    output = place / "elastic"
    with stop_after_the_first_checkpoint(), pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        on_ranks(2, argv(place, output, ds_config="zero3"))
    on_ranks(1, argv(place, output, "--resume", "auto", "--per_device_train_batch_size", "1", ds_config="zero2"))
    # Dropout is drawn by micro-batch, so that another micro-batch draws another; everything else is as it was.
    steps = [row["step"] for row in losses(output)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["tasks"].keys() for row in losses(output)] == [row["tasks"].keys() for row in losses(one_process)]
    assert losses(output)[-1]["loss_lm"] == pytest.approx(losses(one_process)[-1]["loss_lm"], rel=0.05)


def test_the_gate_has_trained_and_the_run_is_whole(place: Path, one_process: Path) -> None:
    start, end = adapter(one_process), None
    checkpoints = sorted((one_process / "checkpoints").iterdir())
    start, end = (load_file(path / "adapter_model.safetensors") for path in (checkpoints[0], checkpoints[-1]))
    gates = [name for name in end if "more_gate" in name]
    assert gates
    assert all((start[name] != end[name]).any() for name in gates)
    for name in ("config.json", "ds_config.json", "versions.json", "metrics.jsonl", "ranks.json"):
        assert (one_process / name).is_file()
    assert adapter(one_process, "best").keys() == end.keys()
    assert not any("base_layer" in name for name in end)


def test_the_standalone_evaluation_repeats_the_runs_scores(
    place: Path, one_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_run.main([str(one_process), "--output_dir", str(place / "again")]) == 0
    capsys.readouterr()
    [found] = (place / "again").rglob("results.json")
    again = {r["task"]: r["metrics"] for r in json.loads(found.read_text())["results"]}
    run = json.loads((one_process / "eval" / "test" / "results.json").read_text())["results"]
    assert again == {r["task"]: pytest.approx(r["metrics"]) for r in run}


def test_a_loss_that_is_not_finite_stops_the_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = place / "nan"
    codes = run_ranks(lambda _: train.main(argv(place, output, "--learning_rate", "1e20", "--max_grad_norm", "0")), 2)
    assert codes == [1, 1]
    error = capfd.readouterr().err
    assert "the loss is not finite at step" in error
    assert "task '" in error


def test_early_stopping_keeps_the_best(place: Path) -> None:
    output = place / "early"
    extra = [
        "--early_stopping_patience",
        "1",
        "--eval_steps",
        "1",
        "--learning_rate",
        "1e-12",
        "--save_total_limit",
        "1",
    ]
    on_ranks(1, argv(place, output, *extra))
    assert len(losses(output)) == 2, "the score cannot rise at this rate: step 1 is the best, step 2 the last"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = place / "dry"
    assert train.main(argv(place, output, "--dry_run")) == 0
    printed = capfd.readouterr().out
    assert "trainable (A " in printed
    assert "parity" in printed
    assert "passes" in printed
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        (["--adapter.r", "3"], None),
        (["--adapter.r", "6"], "2.00 at full rank (r = 6, T = 3)"),
        (["--adapter.r", "4", "--tasks", "parity"], "4.00 at full rank (r = 4, T = 1)"),
        (["--adapter.r", "1"], "0.33 at full rank (r = 1, T = 3)"),
        (["--adapter.r", "6", "--adapter.scale", "none"], None),
        (["--adapter.r", "6", "--method", "lora"], None),
    ],
)
def test_the_header_says_what_the_number_of_tasks_does_to_the_update(
    place: Path, extra: list[str], factor: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(argv(place, place / "dry", "--dry_run", *extra)) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("scale ")]
    assert len(lines) == (factor is not None)
    assert all(str(factor) in line for line in lines)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "parityy"], "unknown task 'parityy'; did you mean 'parity'?"),
        (["--tasks_file", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", "./nowhere"], "no model at ./nowhere"),
        (["--ds_config", "nowhere.json"], "--ds_config nowhere.json does not exist"),
        (["--adapter.target_modules", "[qq_proj]"], "qq_proj"),
        (["--adapter.r", "0"], "MoreConfig.r is 0"),
        (["--per_device_train_batch_size", "3"], "does not divide"),
        (["--max_target_length", "300"], "do not fit the model's 256 positions"),
        (["--resume", "nowhere"], "--resume nowhere is no complete checkpoint"),
        (["--sampling_weights.parity", "1", "--sampling", "weights"], "missing: copy, grade"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_loads(
    place: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(train, "load_base", side_effect=AssertionError("a model was loaded")):
        assert train.main(argv(place, place / "wrong", *extra)) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_another_runs_folder_is_refused(place: Path, one_process: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv(place, one_process)) == 2
    assert "holds another run" in capfd.readouterr().err
    assert train.main(argv(place, one_process, "--resume", "auto", "--seed", "7")) == 2
    assert "seed was 42, is 7" in capfd.readouterr().err
