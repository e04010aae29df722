"""Which stacked weights are adapted, by which method, and what a run says of those that are not."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from moe_models import moe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tokenizer
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from launch import export, train
from more_ds import MoreConfig, plan
from more_ds.errors import UserError
from more_ds.methods import adapter_config
from more_ds.model import attach, parameters_by_kind
from more_ds.planner.memory import inventory
from more_ds.planner.trace import Workload, build, trace
from more_ds.run import Run
from more_ds.tuners.linear import untouched_experts
from more_ds.tuners.stacked_weights import in_words, stacked_experts

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
BOTH = {f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")}
DOWN = {name for name in BOTH if name.endswith("down_proj")}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
TARGETS: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"target_modules": "ffn"}, BOTH, set()),
    ({"target_modules": "attention+ffn"}, BOTH, ATTENTION),
    ({"target_modules": "attention"}, set(), ATTENTION),
    ({"target_modules": "all-linear"}, set(), ATTENTION),
    ({"target_modules": ["q_proj", "experts.gate_up_proj", "down_proj"]}, BOTH, {"q_proj"}),
    ({"target_modules": ["experts.down_proj"]}, DOWN, set()),
    ({"target_modules": r".*\.(v_proj|experts\.down_proj)"}, DOWN, {"v_proj"}),
    ({"target_modules": r".*layers\.1\.mlp\.experts\.\w+_proj"}, {name for name in BOTH if ".1." in name}, set()),
    ({"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, DOWN, {"q_proj"}),
    ({"target_modules": [], "target_parameters": sorted(BOTH)}, BOTH, set()),
    ({"target_modules": ["q_proj", "down_proj"], "target_parameters": []}, set(), {"q_proj"}),
    ({"target_modules": "ffn", "exclude_modules": ["experts.down_proj"]}, BOTH - DOWN, set()),
    ({"target_modules": "ffn", "layers_to_transform": [0]}, {name for name in BOTH if ".0." in name}, set()),
]


@pytest.mark.parametrize(("given", "weights", "maps"), TARGETS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_stacked_weights_by_word_name_and_expression(given: dict[str, Any], weights: set[str], maps: set[str]) -> None:
    adapter = MoreConfig(num_tasks=2, task_type="CAUSAL_LM", **copy.deepcopy(given))
    model = attach(moe(), adapter)
    tuner = model.base_model
    assert set(tuner.targeted_parameter_names) == weights
    assert {name.rpartition(".")[2] for name in tuner.targeted_module_names} == maps
    assert weights <= set(tuner.ranks())
    again = get_peft_model(moe(), MoreConfig(num_tasks=2, task_type="CAUSAL_LM", **adapted_targets(adapter)))
    assert set(again.base_model.ranks()) == set(tuner.ranks())  # a saved configuration says the same


def adapted_targets(adapter: MoreConfig) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in ("target_modules", "target_parameters", "exclude_modules")}


def test_a_second_adapter_finds_the_experts_under_the_first() -> None:
    model: Any = attach(moe(), MoreConfig(num_tasks=2, target_modules="attention+ffn", task_type="CAUSAL_LM"))
    for name, words in (("other", "ffn"), ("third", "attention")):
        model.add_adapter(name, MoreConfig(num_tasks=2, target_modules=words, task_type="CAUSAL_LM"))
    assert set(model.base_model.ranks("other")) == BOTH
    assert not BOTH & set(model.base_model.ranks("third"))
    assert [own.name for own in stacked_experts(model.get_base_model())] == [
        f"model.layers.{i}.mlp.experts" for i in (0, 1)
    ]


def test_pefts_lora_takes_them_too() -> None:
    base = moe()
    for words, maps in (("ffn", set()), ("attention+ffn", ATTENTION)):
        given = adapter_config("lora", {"target_modules": words}, ["a"], base.config)
        model: Any = attach(moe(), given)
        assert set(model.base_model.targeted_parameter_names) == BOTH
        assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == maps
        assert not untouched_experts(model)
    with pytest.raises(UserError, match=r"does not know lora_dropout 0\.1; set it to 0"):
        attach(moe(), LoraConfig(lora_dropout=0.1, target_modules="ffn"))
    with pytest.raises(UserError, match="does not know init_lora_weights pissa; set it to True"):
        attach(moe(), LoraConfig(init_lora_weights="pissa", target_modules="attention+ffn"))
    attach(moe(), LoraConfig(lora_dropout=0.1, target_modules="attention"))


def test_a_model_with_dense_layers_too() -> None:
    """PEFT renames the maps of a dense layer as if they were experts that transformers has stacked since."""
    some = {"mlp_only_layers": [0], "intermediate_size": 24}
    model: Any = attach(moe("qwen3_moe", **some), MoreConfig(num_tasks=2, target_modules="ffn", task_type="CAUSAL_LM"))
    dense = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(model.base_model.ranks()) == dense | {name for name in BOTH if ".1." in name}
    with pytest.raises(UserError, match=r"PEFT takes 3 maps, e\.g\. .* for parts of this model's stacked experts"):
        attach(moe("qwen3_moe", **some), LoraConfig(target_modules="attention+ffn", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("method", ["dora", "vera", "mtl_lora", "adalora"])
def test_other_methods_say_what_they_leave(method: str) -> None:
    base = moe()
    options = {"target_modules": "ffn", **({"r": 4} if method == "mtl_lora" else {})}
    with pytest.raises(
        UserError, match=r"2 modules of stacked experts, [\d,]+ values, which \w+ cannot adapt; use more or"
    ):
        attach(moe(), adapter_config(method, options, ["a"], base.config))
    model = attach(moe(), adapter_config(method, {**options, "target_modules": "attention+ffn"}, ["a"], base.config))
    left = untouched_experts(model)
    assert {key for own in left for key in own.keys} == BOTH
    assert in_words(left) == f"2 modules of stacked experts, {2 * 4 * (48 * 16 + 16 * 24):,} values"


def test_what_an_adapter_leaves_of_a_module() -> None:
    model = attach(moe(), MoreConfig(num_tasks=2, target_modules=["experts.down_proj"]))
    assert {key for own in untouched_experts(model) for key in own.keys} == BOTH - DOWN
    assert untouched_experts(moe().requires_grad_(True)) == []


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(UserError, match="gate_input='pooled' does not go with stacked experts"):
        attach(moe(), MoreConfig(num_tasks=2, target_modules="ffn", gate_input="pooled"))
    config = Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=2)
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": Llama4TextExperts(config)})])})
    with pytest.raises(UserError, match="1 module of stacked experts, 288 values, which MORE cannot adapt"):
        attach(copy.deepcopy(base), MoreConfig(num_tasks=2, target_modules="ffn"))
    with pytest.raises(UserError, match="is a Llama4TextExperts, whose experts MoRE cannot adapt"):
        attach(copy.deepcopy(base), MoreConfig(num_tasks=2, target_modules=[], target_parameters=["experts.down_proj"]))
    spread = moe()
    spread.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(UserError, match="spread over processes"):
        attach(spread, MoreConfig(num_tasks=2, target_modules="ffn"))
    with pytest.raises(ValueError, match="give a list"):
        MoreConfig(target_parameters="experts.down_proj")  # type: ignore[arg-type]


def run_of(folder: Path) -> list[str]:
    moe(vocab_size=VOCABULARY, max_position_embeddings=128).save_pretrained(folder / "model")
    tokenizer(False).save_pretrained(folder / "model")
    rows = "".join(json.dumps({"text": "ab" * (i % 3 + 1), "label": i % 2}) + "\n" for i in range(12))
    (folder / "rows.jsonl").write_text(rows)
    (folder / "tasks.yaml").write_text(
        "tasks:\n  parity:\n    files: {train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}\n"
        '    prompt: "parity: {text}"\n    labels: {0: even, 1: odd}\n    metrics: [accuracy]\n'
    )
    settings = {"tasks_file": str(folder / "tasks.yaml"), "train_batch_size": 4, "max_steps": 1}
    lengths = {"max_source_length": 32, "max_target_length": 16}
    (folder / "recipe.yaml").write_text(json.dumps({**settings, **lengths}))
    return [
        "--recipe",
        str(folder / "recipe.yaml"),
        "--model",
        str(folder / "model"),
        "--output_dir",
        str(folder / "run"),
    ]


def test_a_run_says_what_was_matched_and_what_stays_frozen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*run_of(tmp_path), "--dry_run", "--adapter.target_modules"]
    code, said = train.main([*argv, "attention+ffn"]), capfd.readouterr().out
    assert code == 0, said
    assert re.search(r"maps .*2 q_proj.* 2 gate_up_proj, 2 down_proj", said)
    assert "stacked experts" not in said
    for more in (["attention"], ["attention+ffn", "--method", "vera"]):
        assert train.main([*argv, *more]) == 0
        said = capfd.readouterr().out
        assert re.search(r"\nfrozen +2 modules of stacked experts, 9,216 values", said), said
    assert train.main([*argv, "ffn", "--method", "vera"]) == 2
    said = capfd.readouterr()
    assert "which VERA cannot adapt; use more or lora" in said.out + said.err


RUNS = [("more", "zero2"), *(pytest.param(name, "zero3", marks=pytest.mark.slow) for name in ("more", "lora"))]


@pytest.mark.parametrize(("method", "ds_config"), RUNS)
def test_a_run_trains_resumes_and_is_exported(method: str, ds_config: str, tmp_path: Path) -> None:
    argv = [*run_of(tmp_path)[:4], "--method", method, "--adapter.target_modules", "attention+ffn"]
    argv += ["--ds_config", str(DS_CONFIGS / f"{ds_config}.json"), "--save_steps", "1", "--eval_limit", "4"]
    whole, broken = [*argv, "--output_dir", str(tmp_path / "whole")], [*argv, "--output_dir", str(tmp_path / "broken")]
    assert run_ranks(lambda _: train.main([*whole, "--max_steps", "2"]), 2) == [0, 0]
    with mock.patch.object(Run, "finish", side_effect=KeyboardInterrupt), pytest.raises(RuntimeError):
        run_ranks(lambda _: train.main([*broken, "--max_steps", "2"]), 2)
    checkpoints = sorted((tmp_path / "broken").rglob("step-0000000*"))
    assert [path.name for path in checkpoints] == ["step-00000001", "step-00000002"]
    shutil.rmtree(checkpoints[1])
    assert run_ranks(lambda _: train.main([*broken, "--max_steps", "2", "--resume", "auto"]), 2) == [0, 0]
    one, other = (load_file(tmp_path / name / "last" / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(".experts." in key for key in one)
    assert export.main([str(tmp_path / "whole"), "--form", "lora"]) == 0


def test_the_planner_counts_and_traces_them() -> None:
    config = moe(num_hidden_layers=4).config
    given = MoreConfig(r=4, num_tasks=3, task_dim=5, target_modules="attention+ffn", task_type="CAUSAL_LM")
    counted = plan.count(config, copy.deepcopy(given), False)
    real = attach(moe(num_hidden_layers=4), copy.deepcopy(given))
    assert counted.trainable == parameters_by_kind(real)
    assert counted.trainable["more_A"] == 4 * 4 * (4 * 16 + 4 * (16 + 24))
    assert counted.trainable["more_gate"] == 4 * 6 * (4 * 5 + 4)
    assert (counted.maps["gate_up_proj"], counted.untouched) == (4, "")
    alone = plan.count(config, MoreConfig(num_tasks=3, target_modules="attention"), False)
    assert alone.untouched.startswith("4 modules of stacked experts")

    work = Workload(config, given, torch.bfloat16, torch.float32, 12, 4)
    assert inventory(work).kinds == counted.trainable
    attention = MoreConfig(r=4, num_tasks=3, task_dim=5, target_modules="attention", task_type="CAUSAL_LM")
    bare = Workload(config, attention, torch.bfloat16, torch.float32, 12, 4)
    costs = [trace(build(one), one, 4).flops for one in (work, bare)]
    pairs = 4 * 16 * 2  # of 4 rows of 16 tokens and their 2 experts
    frozen = 4 * 4 * pairs * (48 * 16 + 16 * 24)  # forward and dX, in 4 layers
    assert costs[1] > frozen
    added = 4 * 6 * pairs * 4 * (16 + 48 + 24 + 16)  # A and B, with their own gradients
    assert 1 <= (costs[0] - costs[1]) / added < 1.1
