"""Finished LoRAs put together by one command: MoLE on ranks, LoraHub's search, PEFT's merges, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_methods_peft import place
from test_single import commands
from test_training import DS_CONFIGS, adapter, assert_same_run, zero_stage_file
from tiny_models import base_model

from eval import run as eval_run
from launch import compose
from more_ds import MoreConfig
from more_ds.compose.lorahub import PENALTY, search
from more_ds.compose.sources import aligned, read_source, read_sources, weighted_sum

__all__ = ["commands", "place"]

LORAS = [
    ("a", 2, ["q_proj", "down_proj"]),
    ("b", 3, ["q_proj", "down_proj"]),
    ("c", 2, ["q_proj", "v_proj"]),
]


def scrambled(model: PeftModel, seed: int) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def loras(place: Path) -> list[str]:
    """Three LoRAs of PEFT's, of different ranks and maps, and `more`, an adapter of two tasks, beside them."""
    found = []
    for seed, (name, rank, targets) in enumerate(LORAS):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        model = scrambled(get_peft_model(base_model("llama"), config), seed)
        model.peft_config["default"].base_model_name_or_path = str(place / "llama")
        model.save_pretrained(place / name)
        found.append(str(place / name))
    more = MoreConfig(r=4, num_tasks=2, task_names=["x", "y"], target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = scrambled(get_peft_model(base_model("llama"), more), 9)
    model.peft_config["default"].base_model_name_or_path = str(place / "llama")
    model.save_pretrained(place / "more")
    return found


def flags(place: Path, loras: list[str], *extra: str) -> list[str]:
    recipe = ["--recipe", str(place / "recipe.yaml"), "--model", str(place / "llama")]
    return [*recipe, "--loras", *loras, *extra]


def mole(place: Path, loras: list[str], output: Path, ds_config: str, world: int, *extra: str) -> Path:
    arguments = flags(place, loras, "--ds_config", ds_config, "--output_dir", str(output), *extra)
    assert run_ranks(lambda _: compose.main(arguments), world) == [0] * world
    return output


@pytest.fixture(scope="module")
def trained(place: Path, loras: list[str]) -> Path:
    return mole(place, loras, place / "mole", str(DS_CONFIGS / "zero2.json"), 1)


def test_the_gates_train_and_the_loras_stay_as_they_are(place: Path, loras: list[str], trained: Path) -> None:
    tensors, sources = adapter(trained), [read_source(name) for name in loras]
    gates = [value for name, value in tensors.items() if name.endswith("update.gate")]
    assert len(gates) == 2, "one for each block"
    assert all(value.shape == (3, 16) for value in gates)
    assert not any(torch.allclose(value.norm(dim=1), torch.tensor(0.01)) for value in gates), "they moved"
    start = 0
    for source in sources:
        for name, (a, b) in source.factors.items():
            key = f"base_model.model.{name}.update"
            assert torch.equal(tensors[f"{key}.A"][start : start + len(a)], a)
            assert torch.equal(tensors[f"{key}.B"][:, start : start + len(a)], b)
        start += source.rank
    config = json.loads((trained / "last" / "adapter_config.json").read_text())
    assert (config["loras"], config["ranks"]) == (loras, [2, 3, 2])


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(place: Path, loras: list[str], trained: Path, tmp_path: Path, stage: int) -> None:
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    both = mole(place, loras, tmp_path / "two", str(zero_stage_file(tmp_path, stage, **options)), 2)
    assert_same_run(trained, both)


def test_one_command_trains_the_loras_and_mixes_them(
    place: Path, tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ["--recipe", str(place / "recipe.yaml"), "--lora_recipe", str(place / "recipe.yaml")]
    own = ["--model", str(place / "llama"), "--eval_on_start", "false", "--output_dir", str(tmp_path / "mole")]
    arguments = [*recipe, "--loras_of", "parity,copy", *own]
    mixed: list[Any] = []
    training = SimpleNamespace(train=lambda given, flags, signals: mixed.append((given.loras, flags)))
    monkeypatch.setattr(compose, "train", training)
    assert compose.main(arguments) == 0
    loras = [str(tmp_path / "mole-loras" / name) for name in ("parity", "copy")]
    assert [source.rank for source in read_sources(loras, None)] == [8, 8]
    ((given, flags),) = mixed
    assert given == loras == flags["adapter"]["loras"]
    assert (flags["method"], flags["eval_on_start"]) == ("mole", "false")
    count = len(commands)
    assert compose.main(arguments) == 0
    assert len(commands) == count, "what is finished is not trained again"


def test_what_was_composed_is_scored_again(trained: Path, tmp_path: Path) -> None:
    assert eval_run.main([str(trained), "--limit", "2", "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["base_model"].endswith("llama")


def test_a_mole_masked_to_one_lora_is_that_lora(place: Path, loras: list[str], trained: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(place / "recipe.yaml"), "--method", "mask", "--loras", str(trained)]
    assert compose.main([*arguments, "--only", loras[1], "--output_dir", str(tmp_path / "b"), "--test", "true"]) == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = PeftModel.from_pretrained(base_model("llama"), loras[1]).eval()(input_ids=ids).logits
    found = PeftModel.from_pretrained(base_model("llama"), tmp_path / "b").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "b" / "eval" / "test" / "results.json").is_file()
    for wrong in (["--only", "7"], ["--loras", loras[0], "--only", "0"], []):
        assert compose.main([*arguments, *wrong, "--output_dir", str(tmp_path / "other")]) == 2


def test_tasks_of_a_more_are_loras(place: Path, loras: list[str]) -> None:
    sources = read_sources([f"{place / 'more'}:y", loras[0]], None)
    assert sources[0].rank <= 4
    with pytest.raises(Exception, match="knows 2 tasks; name one"):
        read_source(str(place / "more"))
    with pytest.raises(Exception, match="no task 'z'"):
        read_source(f"{place / 'more'}:z")


def deltas(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


def merged(place: Path, loras: list[str], output: Path, method: str, *extra: str) -> dict[str, torch.Tensor]:
    arguments = ["--method", method, "--output_dir", str(output), "--test", "false", *extra]
    assert compose.main(flags(place, loras, *arguments)) == 0
    return deltas(PeftModel.from_pretrained(base_model("llama"), output))


def test_cat_is_the_weighted_sum_of_the_updates(place: Path, loras: list[str], tmp_path: Path) -> None:
    found = merged(place, loras, tmp_path / "cat", "cat", "--weights", "0.5,-1,2")
    sources = [read_source(name) for name in loras]
    for name in {name for source in sources for name in source.factors}:
        parts = [(w, s.factors[name]) for w, s in zip((0.5, -1, 2), sources, strict=True) if name in s.factors]
        expected = sum(w * b @ a for w, (a, b) in parts)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    document = json.loads((tmp_path / "cat" / "compose.json").read_text())
    assert list(document["weights"].values()) == [0.5, -1, 2]


def test_linear_sums_the_as_and_the_bs(place: Path, loras: list[str], tmp_path: Path) -> None:
    found = merged(place, loras[:2], tmp_path / "linear", "linear")
    both = aligned([read_source(name) for name in loras[:2]])
    for name, (a, b) in weighted_sum(both, [0.5**0.5] * 2).items():
        torch.testing.assert_close(found[name], b @ a, rtol=1e-4, atol=1e-5)


def test_ties_of_one_lora_with_itself_is_the_lora(place: Path, loras: list[str], tmp_path: Path) -> None:
    found = merged(place, [loras[0], loras[0]], tmp_path / "ties", "ties", "--density", "1.0")
    for name, (a, b) in read_source(loras[0]).factors.items():
        torch.testing.assert_close(found[name], 0.5 * b @ a, rtol=1e-4, atol=1e-5)


def test_dare_draws_alike_from_one_seed(place: Path, loras: list[str], tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        merged(place, loras[:2], tmp_path / name, "dare", "--seed", seed)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again", "other")]
    assert files[0] == files[1] != files[2]


def test_lorahub_finds_the_least_loss() -> None:
    wanted = [0.8, -0.4, 3.0]

    def loss(weights: list[float]) -> float:
        return sum((w - best) ** 2 for w, best in zip(weights, wanted, strict=True))

    found = search(loss, 3, 400, 0)
    assert found == search(loss, 3, 400, 0)
    shift = PENALTY / 3 / 2  # where the quadratic's slope equals the penalty's
    assert found == pytest.approx([0.8 - shift, -0.4 + shift, 1.5], abs=0.02)
    assert search(lambda weights: sum(map(abs, weights)), 3, 12, 0) == [0.0, 0.0, 0.0]


def test_lorahub_writes_a_lora_that_is_no_worse(
    place: Path, loras: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", "lorahub", "--output_dir", str(tmp_path / "hub"), "--shots", "2", "--evaluations", "15"]
    assert compose.main(flags(place, loras, *arguments, "--test", "true")) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss "))
    first, last = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
    assert last <= first
    weights = list(json.loads((tmp_path / "hub" / "compose.json").read_text())["weights"].values())
    found = load_file(tmp_path / "hub" / "adapter_model.safetensors")
    for name, (a, _) in weighted_sum(aligned([read_source(n) for n in loras]), weights).items():
        torch.testing.assert_close(found[f"base_model.model.{name}.lora_A.weight"], a)
    assert (tmp_path / "hub" / "eval" / "test" / "results.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--method", "tie"], "did you mean 'ties'?"),
        (["--method", "linear", "--weights", "1,2"], "2 numbers for 3 LoRAs"),
        (["--method", "linear", "--weights", "1,x,2"], "give numbers with commas"),
        (["--method", "ties", "--density", "0"], "above 0 and at most 1"),
        (["--adapter.level", "head"], "use one of block, layer, matrix, network"),
        (["--adapter.ranks", "[1]"], "adapter.ranks: unknown option"),
        (["--loras", "nowhere", "other"], "nowhere holds no adapter"),
        (["--loras", "nowhere"], "at least two"),
        (["--max_step", "1"], "did you mean"),
        (["--loras_of", "parity,copy"], "without --loras"),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, loras: list[str], tmp_path: Path, change: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert compose.main([*flags(place, loras, "--output_dir", str(tmp_path / "run")), *change]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--method", "mask"], "takes one trained MoLE"),
        (["--method", "linear", "--weights", "1"], "1 numbers for 2 LoRAs"),
        (["--method", "ties", "--density", "2"], "at most 1"),
    ],
)
def test_a_mistake_is_found_before_the_loras_are_trained(
    place: Path, tmp_path: Path, change: list[str], message: str, commands: list[list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = ["--recipe", str(place / "recipe.yaml"), "--lora_recipe", str(place / "recipe.yaml")]
    given = [*recipe, "--loras_of", "parity,copy", "--output_dir", str(tmp_path / "run"), *change]
    assert compose.main(given) == 2
    assert message in capfd.readouterr().err
    assert not commands


@pytest.mark.parametrize("method", ["mole", "linear"])
def test_loras_of_another_base_are_refused(
    place: Path, loras: list[str], tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    other = base_model("llama")
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(other, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "other")
    model.save_pretrained(tmp_path / "lora")
    mixed = [loras[0], str(tmp_path / "lora")]
    assert compose.main(flags(place, mixed, "--method", method, "--output_dir", str(tmp_path / "run"))) == 2
    assert "LoRAs go together on one base model" in capfd.readouterr().err
