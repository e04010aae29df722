"""Bases that come quantised: with a stand-in for GPTQ's linear map, since the tests do not install its package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from tiny_models import base_model, tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from launch import train
from more_ds.errors import UserError
from more_ds.methods import METHODS, adapter_config
from more_ds.model import attach, load_base
from more_ds.quantised import check_quantised, quantiser, with_weights
from more_ds.tuners.linear import name_targets

IDS = torch.tensor([[2, 40, 41, 60, 61, 9], [2, 50, 11, 12, 13, 14]])
OURS = [
    name for name, method in METHODS.items()
    if method.config.__module__.startswith("more_ds") and name not in ("mole", "xlora", "full", "attempt")
]  # fmt: skip


class TorchQuantLinear(nn.Module):
    """Whole numbers of 4 bits, eight in an int32, and a scale for every output, as gptqmodel's module has them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(1) / 7
        whole = (weight / scales[:, None]).round().to(torch.int32) + 8  # 1 to 15
        parts = whole.T.reshape(-1, 8, self.out_features) << (4 * torch.arange(8, dtype=torch.int32))[None, :, None]
        self.register_buffer("qweight", parts.sum(1, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.bias = None

    def weight_of(self) -> Tensor:
        parts: Any = self.qweight[:, None] >> (4 * torch.arange(8, dtype=torch.int32))[None, :, None]  # type: ignore
        return ((parts & 15) - 8).reshape(self.in_features, self.out_features).T * self.scales[:, None]  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight_of().T


def quantised() -> Any:
    model = base_model("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, TorchQuantLinear(module))
    return model


def dequantised() -> Any:
    """The same numbers in plain linear maps."""
    model = base_model("llama")
    for name, module in quantised().named_modules():
        if isinstance(module, TorchQuantLinear):
            model.get_submodule(name).weight.data = module.weight_of()
    return model


def extra(model: PeftModel) -> dict[str, Tensor]:
    return {"task_ids": torch.tensor([0, 1])} if getattr(model.base_model, "routes_by_task", False) else {}


def scramble(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_every_method_computes_what_it_does_on_plain_maps(method: str, tmp_path: Path) -> None:
    losses, grads, adapters = [], [], []
    for base in (quantised(), dequantised()):
        adapter = adapter_config(method, {}, ["a", "b"], base.config)
        for name in ("lora_dropout", "dropout"):
            if hasattr(adapter, name):
                setattr(adapter, name, 0.0)
        torch.manual_seed(0)
        model: Any = attach(base, adapter)
        scramble(model)
        model.train()
        loss = model(input_ids=IDS, labels=IDS, **extra(model)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        adapters.append(model.eval())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys()
    assert any(bool(grad.any()) for grad in grads[0].values() if grad is not None)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        expected = adapters[0](input_ids=IDS, **extra(adapters[0])).logits
        adapters[0].save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(quantised(), str(tmp_path)).eval()
        assert torch.equal(again(input_ids=IDS, **extra(again)).logits, expected)
    if METHODS[method].merges != "no":
        with pytest.raises(ValueError, match=r"TorchQuantLinear keeps packed integers.*--form lora"):
            adapters[0].merge_adapter(**({"task": 0} if "task" in METHODS[method].merges else {}))
    with torch.no_grad():
        assert torch.equal(adapters[0].unload()(input_ids=IDS).logits, quantised()(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_pefts_unload_finds_weights_in_packed_maps_for_as_long_as_it_looks() -> None:
    base = quantised()
    packed = [m for m in base.modules() if isinstance(m, TorchQuantLinear)]
    model: Any = get_peft_model(base, adapter_config("more", {}, ["a", "b"], base.config))
    with with_weights(model):
        assert all(hasattr(m, "weight") for m in packed)
        BaseTuner._replace_module(model.base_model, base.model, "norm", packed[0], packed[0])
    assert not any(hasattr(m, "weight") for m in packed)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_all_linear_is_the_quantised_maps_and_not_the_output() -> None:
    found: list[Any] = []
    for base in (quantised(), dequantised()):
        adapter = adapter_config("more", {}, ["a", "b"], base.config)
        found.append(sorted(get_peft_model(base, adapter).base_model.targeted_module_names))
    assert found[0] == found[1]
    assert len(found[0]) == 2 * 7
    config = LoraConfig(target_modules="all-linear")  # PEFT's own methods get the names too
    name_targets(config, quantised())
    assert sorted(config.target_modules or ()) == found[0]
    plain = LoraConfig(target_modules="all-linear")
    name_targets(plain, dequantised())
    assert plain.target_modules == "all-linear"


@pytest.mark.parametrize(("method", "packages"), [("gptq", "gptqmodel and optimum"), ("awq", "gptqmodel")])
def test_a_missing_package_is_one_line_before_any_weight(
    method: str, packages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_model("llama").save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert f"quantised by {method}, which needs {packages}: pip install" in error
    assert len(error.splitlines()) == 1
    assert train.main([*argv, "--quantization", "4bit"]) == 2
    assert "quantised already" in capsys.readouterr().err


def test_gradients_pass_4_bit_maps_after_an_evaluation_as_before(tmp_path: Path) -> None:
    """On a CPU with bfloat16 in hardware they would not, without a word."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = get_peft_model(
        load_base(str(tmp_path), config, dtype="fp32", quantization="4bit"),
        LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14
    ids = torch.arange(12).view(2, 6)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        scored = model.eval()(input_ids=ids).logits
    for a, b in zip(before, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, scored, rtol=1e-5, atol=1e-5)


def test_what_a_quantised_base_cannot_do() -> None:
    config = base_model("llama").config
    assert quantiser(config) is None
    check_quantised(config, "4bit", dtype="bf16", zero3=True)
    with mock.patch("more_ds.quantised.importlib.util.find_spec", return_value=object()):
        for method, options, words in (
            ("gptq", {"dtype": "fp16", "zero3": True}, "ZeRO-3 cannot shard them; use ds_configs/zero2.json"),
            ("awq", {"dtype": "bf16", "on_gpu": True}, "compute in fp16, not bf16"),
        ):
            config.quantization_config = {"quant_method": method}
            with pytest.raises(UserError, match=words):
                check_quantised(config, "none", **options)  # type: ignore[arg-type]
            check_quantised(config, "none", dtype="fp16", on_gpu=True)
    config.quantization_config = {"quant_method": "fp8"}
    check_quantised(config, "none", dtype="bf16", zero3=True)
