"""MoLE against its equations, its masks, its prompts of any length, and what every adapter owes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mole_models import RANKS, TARGETS, mixed, oracle
from oracle import prompts, tiny
from peft import PeftModel, get_peft_model
from test_methods import gradients, logits
from tiny_models import base_model, tokenizer
from torch import Tensor

from more_ds.data.encoding import Encoder
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options, share_prefixes
from more_ds.text_model import TextModel
from more_ds.tuners.mole import MoleConfig, unit_of

LEVELS = ("block", "layer", "matrix", "network")


def inputs(kind: str = "llama") -> dict[str, Tensor]:
    return {key: value for key, value in prompts(kind).items() if key != "task_ids"}


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key not in ("labels", "prompt_mask")}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("only", [None, [0, 2]])
def test_outputs_and_gradients_are_those_of_the_equations(level: str, only: Any) -> None:
    model, loras = mixed(level=level, only=only, balance=0.3)
    model.double().train()
    batch = inputs()
    mask = batch["attention_mask"] * (batch["labels"] == -100)
    mask = torch.where(mask.any(1, keepdim=True), mask, batch["attention_mask"])
    base, gates, table = oracle(model, loras, mask)
    expected = base(**plain(batch), labels=batch["labels"])
    units = len(gates)
    shares = torch.stack([table[key] for key in table]).sum(0) / (units * len(mask))
    balance = -0.3 * sum(torch.log(shares[j]) for j in only or range(3))
    found = model(**batch, prompt_mask=mask)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.base_model.auxiliary_loss, balance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, expected.loss + balance, rtol=1e-9, atol=1e-9)
    (expected.loss + balance).backward()
    found.loss.backward()
    for layer in model.base_model._layers("default"):
        update = layer.update["default"]
        if update.gate is not None:
            for own, leaf in zip((update.gate, update.log_temperature), gates[unit_of(layer.key, level)], strict=True):
                torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("level", "units"), [("block", 2), ("layer", 4), ("matrix", 6), ("network", 1)])
def test_a_gate_for_every_unit_is_all_that_trains(level: str, units: int) -> None:
    model, _ = mixed(level=level, trained=False)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * units
    widths = [
        layer.in_features for layer in model.base_model._layers("default") if layer.update["default"].gate is not None
    ]
    assert sum(trained.values()) == sum(3 * width + 1 for width in widths)


@pytest.mark.parametrize(
    ("key", "block", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.11", "model.layers.11.self_attn"),
        ("encoder.block.3.layer.1.DenseReluDense.wo", "encoder.block.3", "encoder.block.3.layer.1.DenseReluDense"),
        ("transformer.h.0.mlp.c_fc", "transformer.h.0", "transformer.h.0.mlp"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.attentions.0",
         "down_blocks.1.attentions.0.transformer_blocks.0.attn1"),
        ("lm_head", "lm_head", ""),
    ],
)  # fmt: skip
def test_units_by_name(key: str, block: str, layer: str) -> None:
    assert unit_of(key, "block") == block
    assert unit_of(key, "layer") == layer
    assert unit_of(key, "matrix") == key
    assert unit_of(key, "network") == ""


def test_the_start_is_nearly_the_mean_of_the_loras() -> None:
    model, loras = mixed(trained=False)
    base = tiny("llama")
    for name in loras[0]:
        delta = sum(factors[name][1] @ factors[name][0] for factors in loras) / 3
        base.get_submodule(name).weight.data += delta
    torch.testing.assert_close(logits(model, inputs()), logits(base, inputs()), rtol=0.02, atol=0.02)


def test_the_balance_loss_is_least_where_all_say_as_much() -> None:
    model, _ = mixed(trained=False)
    for name, p in model.named_parameters():
        if name.endswith("gate"):
            p.data.zero_()
    model.train()(**inputs())
    assert model.base_model.auxiliary_loss.item() == pytest.approx(0.5 * 3 * math.log(3), rel=1e-6)
    uneven, _ = mixed()
    uneven.train()(**inputs())
    assert uneven.base_model.auxiliary_loss > model.base_model.auxiliary_loss


def test_masking_to_one_lora_is_that_lora_and_merges() -> None:
    model, loras = mixed()
    everything = logits(model, inputs())
    model.base_model.use_loras([1])
    base = tiny("llama")
    for name, (a, b) in loras[1].items():
        base.get_submodule(name).weight.data += b @ a
    alone = logits(model, inputs())
    torch.testing.assert_close(alone, logits(base, inputs()), rtol=1e-4, atol=1e-4)
    model.base_model.use_loras(None)
    assert torch.equal(logits(model, inputs()), everything)
    with pytest.raises(ValueError, match=r"use_loras\(\[0\]\)"):
        model.merge_and_unload()
    assert torch.equal(logits(model, inputs()), everything)
    model.base_model.use_loras([1])
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs()), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_saved_and_loaded_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, _ = mixed(kind)
    model.base_model.use_loras([0, 1])
    expected = logits(model, inputs(kind))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs(kind)), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, inputs(kind)), logits(tiny(kind), inputs(kind)))
    assert torch.equal(logits(loaded.unload(), inputs(kind)), logits(tiny(kind), inputs(kind)))


@pytest.mark.parametrize("level", ["block", "network"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_checkpointing_gives_the_same_gradients(level: str, kind: str) -> None:
    model, _ = mixed(kind, level=level)
    expected = gradients(model, inputs(kind))
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again = gradients(model, inputs(kind))
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def text_model(kind: str, level: str) -> TextModel:
    model, _ = mixed(kind, level=level)
    config = model.peft_config["default"]
    fresh: Any = get_peft_model(base_model(kind), config)
    generator = torch.Generator().manual_seed(4)
    for layer in fresh.base_model._layers("default"):
        update = layer.update["default"]
        for tensor in (update.A, update.B, *(p.data for p in update.parameters())):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        if update.gate is not None:
            update.gate.data *= 50
    encoder = Encoder(
        tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
    )
    return TextModel(fresh.eval(), encoder)


def test_bfloat16_runs_near_float32() -> None:
    model, _ = mixed()
    expected = logits(model, inputs())
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = logits(low, inputs())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.2 * expected.abs().max()
    assert low.train()(**inputs()).loss.isfinite()


def test_training_lowers_the_loss() -> None:
    model, _ = mixed(trained=False, balance=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    first = model(**inputs()).loss.item()
    for _ in range(15):
        optimizer.zero_grad()
        model.train()(**inputs()).loss.backward()
        optimizer.step()
    assert model.eval()(**inputs()).loss.item() < first - 0.02


@pytest.mark.parametrize("level", ["block", "network"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_gate_sees_the_prompt_alone(kind: str, level: str) -> None:
    """Scores depend neither on the neighbours in the batch nor on the answer, and texts are those of the scores."""
    model = text_model(kind, level)
    rows, options = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]], [[[12, 1], [13, 14, 1]], [[13, 14, 15, 1], [16, 1]]]
    assert share_prefixes(model, [(0, rows[1:] * 99)], 1) is None
    together = rank_options(model, rows, [0, 0], options)
    for prompt, own, found in zip(rows, options, together, strict=True):
        assert rank_options(model, [prompt], [0], [own])[0] == pytest.approx(found, abs=1e-4)
    written = generate(model, rows, [0, 0], 4)
    assert written == [generate(model, [prompt], [0], 4)[0] for prompt in rows]
    for prompt, text in zip(rows, written, strict=True):
        options = [[*text[:1], token] for token in range(3, 30)]
        scores = rank_options(model, [prompt], [0], [options])[0]
        if len(text) > 1 and text[1] in range(3, 30):
            assert options[max(range(len(scores)), key=scores.__getitem__)][1] == text[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "head"}, "use one of block, layer, matrix, network"),
        ({"pooling": "max"}, "use one of mean, first, last"),
        ({"loras": ["a"]}, "each needs one above 0"),
        ({"only": [3]}, "numbers 0 to 2"),
        ({"temperature": 0}, "must be above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoleConfig(**{"loras": ["a", "b", "c"], "ranks": RANKS, **options})


def test_a_lora_of_another_shape_is_refused() -> None:
    model, loras = mixed()
    name, (a, b) = next(iter(loras[0].items()))
    with pytest.raises(ValueError, match="and the map is"):
        model.base_model.put(0, {name: (a[:, 1:], b)})
    with pytest.raises(ValueError, match="not adapted"):
        model.base_model.put(0, {"model.layers.0.self_attn.o_proj": (a, b)})
