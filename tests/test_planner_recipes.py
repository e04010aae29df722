"""Every recipe, dry-run on the meta device on the GPUs that it is meant for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import plan
from more_ds.config import build, read_recipe
from more_ds.planner.hardware import find_gpu
from more_ds.planner.search import DS_CONFIGS, Cluster, Subject, best, candidates, shipped

RECIPES = {
    "t5_base_glue": [("rtx-4090", 2)],
    "t5_base_all": [("rtx-4090", 2)],
    "flan_t5_xl_glue": [("a100-80gb", 1), ("rtx-4090", 2)],
    "llama2_7b_glue": [("a100-80gb", 4)],
    "llama2_7b_commonsense": [("a100-80gb", 4)],
    "llama2_7b_nlg": [("a100-80gb", 4)],
    "llama2_7b_all": [("a100-80gb", 4)],
    "llama2_7b_4bit_glue": [("rtx-4090", 1)],
    "llama2_13b_glue": [("a100-80gb", 4), ("a100-40gb", 4)],
    "llama2_70b_glue": [("a100-80gb", 8), ("a100-80gb", 16)],
    "llama2_70b_4bit_glue": [("a100-80gb", 4)],
    "llama3_70b_commonsense": [("a100-80gb", 8), ("a100-80gb", 16)],
    "qwen3_8b_all": [("a100-80gb", 4)],
    "mistral_7b_glue": [("a100-80gb", 4)],
    "mixtral_8x7b_glue": [("a100-80gb", 4)],
}

README = Path(__file__).parents[1] / "README.md"
ROWS = [tuple(row.strip(" |").split(" | ")) for row in re.findall(r"^\| \w+ \| \d+ x .*$", README.read_text(), re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_where_they_say(recipe: str) -> None:
    config = build(read_recipe(recipe), recipe)
    subject = Subject(config)
    for gpu, count in RECIPES[recipe]:
        found = candidates(subject, Cluster(find_gpu(gpu), count, max(1, count // 8)), shipped(config))
        assert best(found) is not None


def test_all_recipes_are_checked() -> None:
    there = {path.stem for path in (Path(plan.__file__).parent / "recipes").glob("*.yaml")} - {
        "demo",
        "demo_paper",
        "mole",
    }
    assert there == set(RECIPES)


def test_the_readmes_rows_are_of_recipes_and_gpus_that_there_are() -> None:
    assert {row[0] for row in ROWS} <= set(RECIPES)
    assert len(ROWS) > 10
    assert {row[2] for row in ROWS} <= {path.stem for path in DS_CONFIGS.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=" on ".join)
def test_the_readme_says_what_the_planner_says(row: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    found = re.fullmatch(r"(\d+) x (\S+)(?: on (\d+) nodes)?", row[1])
    assert found is not None
    count, gpu, nodes = found.groups()
    assert plan.main([row[0], "--gpus", count, "--gpu", gpu, "--nodes", nodes or "1", "--brief"]) == 0
    assert capsys.readouterr().out.strip() == f"| {' | '.join(row)} |"
