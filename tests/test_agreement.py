"""Ranks that would train different runs are found before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from fault_runs import argv, make_place, start

from launch import train
from more_ds import plan, run_folder
from more_ds.agreement import check_ranks, fingerprint
from more_ds.config import build, read_recipe
from more_ds.data.sampler import BalancedSampler
from more_ds.engine import Ranks
from more_ds.errors import UserError


def compare(ranks: Ranks, odd: dict[str, str]) -> str:
    same = {"configuration": "abc", "versions": "python 3.11.1, torch 2.13.0, peft 0.21"}
    try:
        check_ranks(ranks, same | (odd if ranks.rank == 1 else {}))
    except UserError as error:
        return str(error)
    return ""


def test_what_differs_is_named_on_every_rank() -> None:
    found = run_ranks(compare, 3, {"versions": "python 3.11.1, torch 2.12.1, peft 0.21"})
    assert len(set(found)) == 1
    assert "differ in their versions: torch 2.13.0 on rank 0, torch 2.12.1 on rank 1;" in found[0]
    assert run_ranks(compare, 2, {}) == ["", ""]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("agreement"))


def make_plan(place: Path) -> plan.Plan:
    config = build(read_recipe(str(place / "recipe.yaml")), "test")
    return plan.make(config, ds_config_path=str(place / "zero2.json"), world=2, on_gpu=False)


def another_configuration(made: plan.Plan) -> plan.Plan:
    return replace(made, config=replace(made.config, learning_rate=0.5))


def another_row(made: plan.Plan) -> plan.Plan:
    rows = list(made.train[1])
    rows[3] = replace(rows[3], target="aab")
    return replace(made, train=[made.train[0], rows])


def another_order(made: plan.Plan) -> plan.Plan:
    return replace(made, train=[list(reversed(made.train[0])), made.train[1]])


def another_gold(made: plan.Plan) -> plan.Plan:
    made.validation["copy"][0] = replace(made.validation["copy"][0], gold=("b",))
    return made


def another_stage(made: plan.Plan) -> plan.Plan:
    return replace(made, ds_config=made.ds_config | {"zero_optimization": {"stage": 1}})


def another_sampler(made: plan.Plan) -> plan.Plan:
    return replace(made, sampler=BalancedSampler([23, 11], group_size=1, groups_per_step=4, seed=43))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_configuration, "configuration"),
        (another_row, "training data"),
        (another_order, "training data"),
        (another_gold, "scored data"),
        (another_stage, "DeepSpeed configuration"),
        (another_sampler, "sampling plan"),
    ],
)
def test_a_fingerprint_shows_what_differs(place: Path, change: Any, what: str) -> None:
    mine, other = fingerprint(make_plan(place), None), fingerprint(change(make_plan(place)), None)
    assert [name for name in mine if mine[name] != other[name]] == [what]
    assert fingerprint(make_plan(place), None) == mine


def test_a_rank_with_a_row_of_its_own_ends_the_run_with_one_line(place: Path, tmp_path: Path) -> None:
    def patch(rank: int) -> None:
        def load(*arguments: Any, **options: Any) -> None:
            raise AssertionError("a model was loaded")

        original = plan.make
        train.load_base = load
        if rank == 1:
            plan.make = lambda *arguments, **options: another_row(original(*arguments, **options))

    job = start(argv(place, tmp_path / "run"), tmp_path / "log", patch=patch)
    assert job.wait() == [2, 2]
    [line] = [line for line in job.log.read_text().splitlines() if line.startswith("error")]
    assert line.startswith("error: the ranks differ in their training data: ")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_see_the_checkpoints_is_found(place: Path, tmp_path: Path) -> None:
    """A run folder on a disk that only the first node has."""
    assert start(argv(place, tmp_path / "run", "--max_hours", "1e-5"), tmp_path / "log").wait() == [75, 75]

    def patch(rank: int) -> None:
        if rank == 1:
            run_folder.newest_complete = lambda folder: None

    job = start(argv(place, tmp_path / "run"), tmp_path / "log", patch=patch)
    assert job.wait() == [2, 2]
    assert "differ in their checkpoint: step-00000001 on rank 0, none on rank 1" in job.log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]
