"""X-LoRA against PEFT's own, where that computes the same; what every adapter owes; one process and two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from peft import XLoraConfig as TheirConfig
from test_compose import flags, loras
from test_methods_peft import place
from test_training import adapter, assert_same_run, zero_stage_file
from tiny_models import base_model

from eval import run as evaluation
from launch import compose
from more_ds.compose.sources import read_source
from more_ds.tuners import XLoraConfig

__all__ = ["loras", "place"]

IDS = torch.tensor([[2, 40, 41, 60, 61, 9], [2, 50, 11, 12, 13, 14]])
RANKS = [2, 3]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = []
    for i, rank in enumerate(RANKS):
        config = LoraConfig(r=rank, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(base_model("llama"), config)
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            if p.requires_grad:
                p.data = 0.3 * torch.randn(p.shape, generator=generator)
        model.peft_config["default"].base_model_name_or_path = "llama"
        found.append(str(tmp_path_factory.mktemp("lora") / str(i)))
        model.save_pretrained(found[-1])
    return found


def ours(folders: list[str], **options: Any) -> Any:
    sources = [read_source(name) for name in folders]
    maps = sorted(sources[0].factors)
    config = XLoraConfig(loras=folders, ranks=RANKS, target_modules=maps, task_type="CAUSAL_LM", **options)
    model: Any = get_peft_model(base_model("llama"), config)
    for i, source in enumerate(sources):
        model.base_model.put(i, source.factors)
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator)
    return model.eval()


def classifier(model: Any) -> Any:
    return model.base_model.model.shared_update.update["default"].layers


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_outputs_and_gradients_are_those_of_pefts(layerwise: bool, depth: int, folders: list[str]) -> None:
    own = ours(folders, layerwise=layerwise, depth=depth, width=12, temperature=0.7)
    base = base_model("llama")
    base.config.use_cache = False
    config = TheirConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters=dict(zip("01", folders, strict=True)), xlora_depth=depth,
        xlora_size=12, layerwise_scalings=layerwise, softmax_temperature=0.7,
    )  # fmt: skip
    theirs: Any = get_peft_model(base, config)
    theirs.base_model.internal_xlora_classifier.layers.load_state_dict(classifier(own).state_dict())
    found, expected = (model(input_ids=IDS, labels=IDS) for model in (own, theirs))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert (found.logits - base_model("llama")(input_ids=IDS).logits).abs().max() > 0.1
    for outputs in (found, expected):
        outputs.loss.backward()
    pairs = zip(
        classifier(own).parameters(), theirs.base_model.internal_xlora_classifier.layers.parameters(), strict=True
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
        assert bool(mine.grad.any())
    assert {id(p) for p in own.parameters() if p.requires_grad} == {id(p) for p in classifier(own).parameters()}


def test_checkpointing_computes_the_same_gradients(folders: list[str]) -> None:
    grads = []
    for checkpointing in (False, True):
        model = ours(folders, layerwise=True).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in classifier(model).parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_what_an_adapter_owes(folders: list[str], tmp_path: Path) -> None:
    model = ours(folders)
    logits, plain = model(input_ids=IDS).logits, base_model("llama")(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(str(tmp_path))
    again: Any = PeftModel.from_pretrained(base_model("llama"), str(tmp_path)).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
    written = again.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    text = IDS
    for _ in range(3):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, text)
    with pytest.raises(ValueError, match="weighs its LoRAs for every token, so it cannot be merged"):
        model.merge_adapter()
    assert torch.equal(again.unload()(input_ids=IDS).logits, plain)
    with pytest.raises(ValueError, match="this model has two; use MoLE"):
        get_peft_model(
            base_model("t5"), XLoraConfig(loras=["a"], ranks=[2], target_modules=["q"], task_type="SEQ_2_SEQ_LM")
        )


def run(place: Path, loras: list[str], output: Path, stage: int, world: int) -> Path:
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    ds_config = str(zero_stage_file(place, stage, **options))
    extra = ["--method", "xlora", "--ds_config", ds_config, "--output_dir", str(output), "--adapter.layerwise", "true"]
    arguments = flags(place, loras, *extra)
    assert run_ranks(lambda _: compose.main(arguments), world) == [0] * world
    return output


@pytest.fixture(scope="module")
def alone(place: Path, loras: list[str]) -> Path:
    return run(place, loras, place / "xlora", 0, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(stage: int, place: Path, loras: list[str], alone: Path, tmp_path: Path) -> None:
    assert_same_run(alone, run(place, loras, tmp_path / "two", stage, 2))


def test_the_classifier_trains_and_the_loras_stay(place: Path, loras: list[str], alone: Path, tmp_path: Path) -> None:
    tensors, start = adapter(alone), 0
    for source in map(read_source, loras):
        for name, (a, _) in source.factors.items():
            assert torch.equal(tensors[f"base_model.model.{name}.update.A"][start : start + len(a)], a)
        start += source.rank
    (weight,) = (value for name, value in tensors.items() if name.endswith("layers.0.weight") and "shared" in name)
    assert weight.shape[1] == 16
    assert evaluation.main([str(alone), "--output_dir", str(tmp_path)]) == 0
