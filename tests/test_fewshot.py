"""Few-shot transfer: the draws, the command as a whole, what it keeps, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from toy_suite import NAMES, toy_row, write_toy

from eval import run as eval_run
from launch import transfer
from more_ds.errors import UserError
from more_ds.fewshot import Draw, FewShot, draw_shots, started_from, summary
from more_ds.tasks import Task, load_suite
from more_ds.tasks.render import Example, render

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
SUITE = """
suite: fresh
tasks:
  fresh:
    files: {train: fresh.jsonl, test: fresh.jsonl}
    prompt: "accept: {text}"
    labels: {0: bad, 1: good}
    metrics: [accuracy]
  accept:
    files: {train: fresh.jsonl, test: fresh.jsonl}
    prompt: "accept: {text}"
    labels: {0: bad, 1: good}
    metrics: [accuracy]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy adapter, and a task that it does not know."""
    path = write_toy(tmp_path_factory.mktemp("transfer"))
    (path / "fresh.jsonl").write_text("".join(json.dumps(toy_row("accept", i)) + "\n" for i in range(20)))
    (path / "fresh.yaml").write_text(SUITE)
    return path


def argv(place: Path, output: str, *extra: str) -> list[str]:
    return [
        str(place / "adapter"), "--task", "fresh/fresh", "--tasks_file", str(place / "fresh.yaml"), "--shots", "2,4",
        "--seeds", "2", "--max_steps", "4", "--learning_rate", "0.05", "--train_batch_size", "4",
        "--per_device_train_batch_size", "2", "--batch_size", "8", "--output_dir", str(place / output), *extra,
    ]  # fmt: skip


def results(place: Path, output: str) -> dict[str, Any]:
    return json.loads((place / output / "results.json").read_text())


def start(place: Path, world: int, arguments: list[str]) -> None:
    assert run_ranks(lambda _: transfer.main(arguments), world) == [0] * world


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Any]:
    """The reference: one process without sharding."""
    start(place, 1, argv(place, "one", "--save_adapters"))
    return results(place, "one")


def test_a_run_and_what_it_leaves(place: Path, one: dict[str, Any]) -> None:
    assert [(d["shots"], d["seed"]) for d in one["draws"]] == [(2, 0), (4, 0), (2, 1), (4, 1)]
    for draw in one["draws"]:
        assert sum(draw["votes"].values()) == 2 * draw["shots"]
        assert draw["init_from"] == max(NAMES, key=lambda name: draw["votes"].get(name, 0))
        assert draw["loss"][-1] < draw["loss"][0]
    assert one["majority"] == {"accuracy": 50.0}
    for row in one["summary"]:
        values = [
            draw["metrics"]["accuracy"] if row["shots"] else draw["untrained"]["accuracy"]
            for draw in one["draws"]
            if row["shots"] in (0, draw["shots"])
        ]
        assert (row["draws"], row["mean"]) == (len(values), pytest.approx(sum(values) / len(values)))


def test_the_saved_adapter_has_moved_in_one_place_and_is_scored_alike(place: Path, one: dict[str, Any]) -> None:
    folder = place / "one" / "adapters" / "shots-0004-seed-1"
    old = load_file(place / "adapter" / "adapter_model.safetensors")
    new = load_file(folder / "adapter_model.safetensors")
    for name, tensor in old.items():
        kept = new[name][: len(tensor)] if "more_ranks" in name else new[name]
        assert torch.equal(tensor, kept), name
    assert {name.rpartition(".")[2] for name in set(new) - set(old)} == {"added_0"}
    arguments = ["--tasks_file", str(place / "fresh.yaml"), "--tasks", "fresh", "--output_dir", str(place / "again")]
    assert eval_run.main([str(folder), "--base_model", str(place / "base"), *arguments]) == 0
    [again] = json.loads((place / "again" / "results.json").read_text())["results"]
    assert again["metrics"] == one["draws"][3]["metrics"]


def test_two_ranks_with_zero_2_are_one_process(place: Path, one: dict[str, Any]) -> None:
    start(place, 2, argv(place, "two", "--ds_config", str(DS_CONFIGS / "zero2.json")))
    for a, b in zip(one["draws"], results(place, "two")["draws"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert {key: b[key] for key in ("shots", "seed", "init_from", "votes", "untrained", "metrics")} == {
            key: a[key] for key in ("shots", "seed", "init_from", "votes", "untrained", "metrics")
        }


@pytest.mark.slow
def test_the_whole_adapter_under_zero_3(place: Path) -> None:
    extra = ("--train", "all", "--init_from", "choose", "--shots", "2", "--seeds", "1")
    start(place, 1, argv(place, "all", *extra))
    start(place, 2, argv(place, "all-3", *extra, "--ds_config", str(DS_CONFIGS / "zero3.json")))
    [a], [b] = results(place, "all")["draws"], results(place, "all-3")["draws"]
    assert (a["init_from"], a["votes"]) == ("choose", {})
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    assert a["loss"][-1] < a["loss"][0]


def test_finished_draws_are_kept(place: Path, one: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    kept = {path.name: path.stat().st_mtime_ns for path in (place / "one" / "draws").iterdir()}
    (place / "one" / "draws" / "shots-0002-seed-1.json").unlink()
    learnt: list[int] = []
    train = FewShot.train

    def watched(self: FewShot, shots: list[Example], seed: int) -> list[float]:
        learnt.append(seed)
        found = train(self, shots, seed)
        assert learnt == [1]
        return found

    with mock.patch.object(FewShot, "train", watched):
        start(place, 1, argv(place, "one"))
    assert results(place, "one") == one
    now = {path.name: path.stat().st_mtime_ns for path in (place / "one" / "draws").iterdir()}
    assert [name for name in kept if now[name] != kept[name]] == ["shots-0002-seed-1.json"]
    # More shots and seeds may be asked for; other settings may not.
    assert run_ranks(lambda _: transfer.main(argv(place, "one", "--learning_rate", "0.1")), 1) == [2]
    assert "holds other draws: learning_rate was 0.05, is 0.1" in capfd.readouterr().err


def test_draws_of_an_adapter_that_was_trained_anew_are_not_kept(
    place: Path, one: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    weights = place / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    tensors[next(iter(tensors))].add_(1)
    try:
        save_file(tensors, weights)
        assert run_ranks(lambda _: transfer.main(argv(place, "one")), 1) == [2]
        assert "holds other draws: adapter_sha256 was" in capfd.readouterr().err
        weights.unlink()
        assert transfer.main(argv(place, "one")) == 2
        assert "no adapter_model.safetensors in" in capfd.readouterr().err
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--init_from", "chose"], "--init_from: unknown task 'chose'; did you mean 'choose'"),
        (["--shots", "2,11"], "11 shots wanted, and class 'bad' has 10 rows; ask for fewer"),
        (["--shots", "2,x"], "--shots is '2,x'"),
        (["--task", "fresh/accept"], "the adapter knows task 'accept' already; it knows: accept, grade, choose, tell"),
        (["--task", "fresh/frsh"], "unknown task 'fresh/frsh'"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--train_split", "dev"], "no split 'dev'"),
        (["--train_batch_size", "3"], "does not divide"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_loads(
    place: Path, extra: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(transfer, "load_text_model", side_effect=AssertionError("a model was loaded")):
        assert transfer.main(argv(place, "wrong", *extra)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (place / "wrong").exists()


def test_a_sharding_that_only_gpus_can_do_is_refused(
    place: Path, quantised_gathers: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert transfer.main(argv(place, "wrong", "--ds_config", str(quantised_gathers))) == 2
    assert "zero_quantized_weights in the ds_config needs a GPU" in capfd.readouterr().err


@pytest.fixture(scope="module")
def task(place: Path) -> Task:
    return load_suite(place / "fresh.yaml")[0]


def test_draws_are_balanced_nested_and_repeatable(task: Task) -> None:
    rows = [render(task, {"text": f"row {i}", "label": int(i % 5 == 0)}, i) for i in range(100)]
    few, many = draw_shots(task, rows, 4, seed=3), draw_shots(task, rows, 16, seed=3)
    assert Counter(shot.gold for shot in many) == {0: 16, 1: 16}
    assert set(few) < set(many)
    assert draw_shots(task, rows, 4, seed=3) == few
    assert draw_shots(task, rows, 4, seed=4) != few
    assert len({shot.index for shot in many}) == 32
    with pytest.raises(UserError, match="21 shots wanted, and class 'good' has 20 rows"):
        draw_shots(task, rows, 21, seed=3)


def test_the_shots_of_scitail_are_those_of_leopard_where_its_files_are_read(data_dir: Path, place: Path) -> None:
    """Its file of 16 per class, drawn 16 per class, is the whole file."""
    arguments = transfer._parser().parse_args(
        [str(place / "adapter"), "--task", "scitail", "--train_split", "train_kshot16_seed{seed}", "--shots", "16"]
    )
    arguments.data_dir, arguments.limit, arguments.seeds = str(data_dir), 10, 2
    plan = transfer._plan(arguments, mock.Mock(world=1, on_gpu=False))
    assert {key: len(shots) for key, shots in plan.draws.items()} == {(16, 0): 32, (16, 1): 32}
    assert {shot.prompt for shot in plan.draws[16, 0]} != {shot.prompt for shot in plan.draws[16, 1]}


def test_a_start_copies_the_sources_embedding_and_rank() -> None:
    tensors = {
        "m.more_task.weight": torch.arange(6.0).view(3, 2),
        "m.more_task.added_0": torch.full((1, 2), 7.0),
        "m.more_task.added_1": torch.full((1, 2), 8.0),
        "m.more_ranks": torch.tensor([1, 2, 3, 4, 1]),
        "m.more_A.weight": torch.ones(2, 2),
    }
    changed = started_from(tensors, 2)
    assert changed["m.more_task.added_1"].tolist() == [[4.0, 5.0]]
    assert changed["m.more_ranks"].tolist() == [1, 2, 3, 4, 3]
    changed = started_from(tensors, 3)
    assert changed["m.more_task.added_1"].tolist() == [[7.0, 7.0]]
    assert changed["m.more_ranks"].tolist() == [1, 2, 3, 4, 4]
    assert all(torch.equal(changed[k], tensors[k]) for k in ("m.more_task.weight", "m.more_task.added_0"))


def test_mean_and_deviation() -> None:
    draws = [
        Draw(k, seed, "a", {}, [1.0], {"accuracy": 40.0}, {"accuracy": value})
        for k, seed, value in ((4, 0, 50.0), (4, 1, 60.0), (4, 2, 70.0), (16, 0, 80.0))
    ]
    zero, four, sixteen = summary(draws, "accuracy")
    assert (zero["mean"], zero["deviation"], zero["draws"]) == (40.0, 0.0, 4)
    assert (four["mean"], four["deviation"], four["lowest"], four["highest"]) == (60.0, 10.0, 50.0, 70.0)
    assert sixteen["deviation"] is None
