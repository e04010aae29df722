"""Full fine-tuning: all of a model trained in the same loop, saved as an ordinary model, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from test_methods_peft import argv, place
from test_training import DS_CONFIGS, losses, stop_after_the_first_checkpoint, zero_stage_file
from tiny_models import base_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from eval import run as eval_run
from launch import generate, train
from more_ds import plan
from more_ds.loading import find_subject
from more_ds.methods import adapter_config
from more_ds.model import attach

__all__ = ["place"]

SETTINGS = ["--learning_rate", "0.003"]


def run(place: Path, output: Path, *extra: str, model: str = "llama", world: int = 1, ds: str | None = None) -> Path:
    ds = ds or str(DS_CONFIGS / "zero2.json")
    arguments = argv(place, "full", *SETTINGS, "--ds_config", ds, "--output_dir", str(output), *extra, model=model)
    assert run_ranks(lambda _: train.main(arguments), world) == [0] * world
    return output


def weights(output: Path, slot: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / slot / "model.safetensors")


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(place, tmp_path_factory.mktemp("full") / "run")


def test_everything_trains_and_what_is_saved_is_a_model(place: Path, trained: Path) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(trained / "last", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = dict(AutoModelForCausalLM.from_pretrained(place / "llama").named_parameters())
    assert {name for name, p in loaded.named_parameters() if not torch.equal(p, base[name])} == set(base)
    assert len(AutoTokenizer.from_pretrained(trained / "last")) == len(AutoTokenizer.from_pretrained(place / "llama"))
    assert loaded.config.use_cache
    checkpoint = load_file(next((trained / "checkpoints").iterdir()) / "adapter_model.safetensors")
    assert checkpoint.keys() == base.keys()


def test_one_step_is_that_of_plain_adamw(place: Path, tmp_path: Path) -> None:
    """The first step of AdamW moves every weight by the learning rate, against its gradient's sign."""
    settings = ["--max_steps", "1", "--weight_decay", "0", "--adam_epsilon", "1e-12", "--max_grad_norm", "0"]
    moved = weights(run(place, tmp_path / "run", *settings))
    base = dict(AutoModelForCausalLM.from_pretrained(place / "llama").named_parameters())
    steps = torch.cat([(moved[name] - p).detach().abs().flatten() for name, p in base.items()])
    used = steps[steps > 1e-6]
    assert len(used) > 0.5 * len(steps)
    torch.testing.assert_close(used, torch.full_like(used, 0.003), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process(place: Path, trained: Path, tmp_path: Path, stage: int) -> None:
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    both = run(place, tmp_path / "run", world=2, ds=str(zero_stage_file(tmp_path, stage, **options)))
    expected = weights(trained)
    for name, value in weights(both).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert len(losses(both)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_ends_with_the_same_bytes(place: Path, tmp_path: Path, stage: int) -> None:
    ds = str(zero_stage_file(tmp_path, stage))
    extra = ("--save_steps", "1")
    whole = run(place, tmp_path / "whole", *extra, ds=ds)
    broken = argv(place, "full", *SETTINGS, "--ds_config", ds, "--output_dir", str(tmp_path / "broken"), *extra)
    with stop_after_the_first_checkpoint(), pytest.raises(RuntimeError):
        run_ranks(lambda _: train.main(broken), 1)
    assert run_ranks(lambda _: train.main([*broken, "--resume", "auto"]), 1) == [0]
    first, second = weights(whole), weights(tmp_path / "broken")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_is_scored_and_answers_as_what_it_is(place: Path, trained: Path, tmp_path: Path) -> None:
    assert find_subject(str(trained)).adapter is None
    assert eval_run.main([str(trained), "--limit", "2", "--output_dir", str(tmp_path / "eval")]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["base_model"] == str(trained / "best")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "copy: ab"}\n')
    assert generate.main([str(trained), "--input", str(rows), "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert eval_run.main([str(trained), "--base_model", str(place / "llama")]) == 2


@pytest.mark.slow
def test_t5_with_tied_embeddings_comes_back_whole(place: Path, tmp_path: Path) -> None:
    output = run(place, tmp_path / "run", model="t5")
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(output / "last", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.shared.weight, weights(output)["shared.weight"])


def test_a_quantised_base_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv(place, "full", "--quantization", "4bit")) == 2
    assert "full does not go with a quantised base" in capfd.readouterr().err


def test_no_adapter_is_attached(place: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "llama").requires_grad_(False)
    model = attach(base, adapter_config("full", {}, ["a"], base.config))
    assert model is base
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_tied_head_is_counted_once(kind: str) -> None:
    """Beside the parameters of the model itself, all trained, or all frozen below a LoRA."""
    config = base_model(kind).config
    config.tie_word_embeddings = True
    model = {"llama": LlamaForCausalLM, "t5": T5ForConditionalGeneration}[kind](config)
    whole = sum(p.numel() for p in model.parameters())
    trained = plan.count(config, adapter_config("full", {}, ["a"], config), False)
    assert (sum(trained.trainable.values()), trained.frozen) == (whole, 0)
    assert plan.count(config, adapter_config("lora", {}, ["a"], config), False).frozen == whole
