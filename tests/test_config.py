"""Configuration: recipes, flags, DeepSpeed's JSON, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from more_ds import cli
from more_ds.config import RECIPES, RunConfig, build, read_recipe
from more_ds.ds_config import BatchSizes, batch_sizes, resolve, with_monitors, zero_stage
from more_ds.errors import UserError

DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))


def parse(*argv: str) -> dict[str, object]:
    return cli.parse(cli.config_parser("test"), argv)[1]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_configuration(path: Path) -> None:
    name = path.relative_to(RECIPES).with_suffix("").as_posix()
    config = build(read_recipe(name), name)
    assert path.parent == RECIPES or config.method == path.stem


def test_the_defaults_are_the_papers() -> None:
    config = RunConfig()
    assert (config.learning_rate, config.warmup_steps, config.num_train_epochs) == (3e-4, 500, 5)
    assert (config.train_batch_size, config.max_source_length, config.lr_scheduler_type) == (32, 128, "linear")
    assert config.sampling == "exp_share"


def test_flags_are_typed_and_take_dashes_lists_and_nested_keys() -> None:
    flags = parse(
        "--learning-rate", "3e-3", "--tasks", "cola,rte", "--adapter.r", "4", "--adapter.gate=soft",
        "--max_steps=7", "--test", "false", "--gradient_checkpointing",
    )  # fmt: skip
    config = build(flags, "flags")
    assert config.learning_rate == 3e-3
    assert config.tasks == ["cola", "rte"]
    assert config.adapter == {"r": 4, "gate": "soft"}
    assert (config.max_steps, config.test, config.gradient_checkpointing) == (7, False, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnin_rate": 1}, "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
        ({"max_steps": "many"}, "max_steps: 'many' is not int"),
        ({"max_steps": True}, "max_steps: True is not int"),
        ({"dtype": "fp8"}, "'fp8'; use one of auto, fp32, bf16, fp16"),
        ({"learning_rate": 0}, "learning_rate is 0.0; it must be above 0"),
        ({"method": "mroe"}, "unknown method 'mroe'; did you mean 'more'?"),
        ({"adapter": {"gaet": "soft"}}, "adapter.gaet: unknown option; did you mean 'gate'?"),
        ({"report_to": ["tensorbord"]}, "report_to names 'tensorbord'; did you mean 'tensorboard'?"),
        ({"suite": 3}, "suite: 3 is not a list"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(values, "recipe 'x'")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        build({"sede": 1, "dtype": "x"}, "recipe 'x'")
    assert "'sede'" in str(error.value)
    assert "dtype" in str(error.value)


def test_unknown_flags_and_recipes_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown argument '--learning_rat'; did you mean 'learning_rate'"):
        parse("--learning_rat", "1")
    with pytest.raises(UserError, match="no recipe 'demmo'; did you mean 'demo'"):
        read_recipe("demmo")
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="is not YAML"):
        read_recipe(str(bomb))


def test_another_method_leaves_out_what_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"adapter": {"r": 4, "lora_alpha": 8, "task_dim": 16}}
    config = cli.merged(recipe, {"method": "lora"}, "recipe 'mine'")
    assert (config.method, config.adapter) == ("lora", {"r": 4, "lora_alpha": 8})
    assert "recipe 'mine': task_dim of its adapter mean nothing to lora; left out" in capsys.readouterr().out
    assert cli.merged(recipe, {"method": "more"}, "mine").adapter == recipe["adapter"]
    # What the flags say is never left out; nor is a recipe's own mistake.
    for given in ({"method": "lora", "adapter": {"task_dim": 3}}, {"learning_rate": 1.0}):
        with pytest.raises(UserError, match="unknown option"):
            cli.merged({"method": "lora", **recipe}, given, "mine")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("wrong\nthing")

    assert cli.run(lambda: None) == 0
    assert cli.run(fail) == 2
    assert capsys.readouterr().err == "error: wrong thing\n"


@pytest.mark.parametrize(
    ("micro", "accumulation", "world", "expected"),
    [
        (None, None, 2, (16, 1)),
        (4, None, 2, (4, 4)),
        (None, 8, 1, (4, 8)),
        (8, 2, 2, (8, 2)),
    ],
)
def test_batch_sizes_follow_from_the_global_batch(
    micro: int | None, accumulation: int | None, world: int, expected: tuple[int, int]
) -> None:
    config = RunConfig(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    sizes = batch_sizes(config, world)
    assert (sizes.micro, sizes.accumulation) == expected
    assert sizes.micro * sizes.accumulation * sizes.world == sizes.total == 32


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(None, None, 3), (5, None, 2), (8, 2, 4), (64, None, 1)])
def test_a_batch_that_does_not_divide_is_refused(micro: int | None, accumulation: int | None, world: int) -> None:
    config = RunConfig(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    with pytest.raises(UserError, match=f"train_batch_size=32 does not divide into {world} ranks"):
        batch_sizes(config, world)


SIZES = BatchSizes(total=32, micro=8, accumulation=2, world=2)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_ds_config_resolves_without_auto(path: Path, dtype: str) -> None:
    result = resolve(str(path), RunConfig(max_grad_norm=0.5), SIZES, dtype)
    assert "auto" not in json.dumps(result)
    assert result["gradient_clipping"] == 0.5
    assert result["train_batch_size"] == 32
    assert result["bf16"]["enabled"] is (dtype == "bf16")
    assert zero_stage(result) == (2 if "zero2" in path.stem else 3)


def test_clipping_is_always_written() -> None:
    assert resolve(None, RunConfig(max_grad_norm=0.0), SIZES, "fp32")["gradient_clipping"] == 0.0


def write(folder: Path, content: object) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4 in .* and 8 in the run"),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0 in .* and 1.0 in the run"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True in .* and False in the run"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.params.lr is 0.0001 in .* and 0.0003"),
        ({"zero_optimisation": {"stage": 2}}, "unknown key zero_optimisation; did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, '"auto" is not known for zero_opt'),
        ("{", "is not JSON"),
        ([], "holds list, not an object"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(write(tmp_path, content), RunConfig(), SIZES, "fp32")


def test_equal_values_and_auto_are_no_contradiction(tmp_path: Path) -> None:
    same = {
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 1},
    }
    result = resolve(write(tmp_path, same), RunConfig(), SIZES, "fp32")
    assert zero_stage(result) == 1
    assert "optimizer" not in result


def test_a_missing_ds_config_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {})
    with pytest.raises(UserError, match="does not exist; did you mean"):
        resolve(str(tmp_path / "dss.json"), RunConfig(), SIZES, "fp32")


def test_monitors_are_written_into_the_ds_config(tmp_path: Path) -> None:
    result = with_monitors({"zero_optimization": {"stage": 0}}, ["csv", "tensorboard"], tmp_path)
    assert result["csv_monitor"] == {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    assert result["tensorboard"]["enabled"] is True
    assert "wandb" not in result
