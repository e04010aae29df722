"""MoLE in a UNet of diffusers, as in the vision half of its paper: a tiny random text-to-image model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from more_ds.tuners.mole import MoleConfig

diffusers = pytest.importorskip("diffusers")

MAPS = r".*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.0\.proj)"


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip


def mixed(**options: Any) -> Any:
    config = MoleConfig(loras=["cat", "hat"], ranks=[2, 2], target_modules=MAPS, pooling="mean", **options)
    model = get_peft_model(unet(), config)
    generator = torch.Generator().manual_seed(1)
    for layer in model.base_model._layers("default"):
        for i in range(2):
            a, b = (
                torch.randn(2, layer.in_features, generator=generator),
                torch.randn(layer.out_features, 2, generator=generator),
            )
            model.base_model.put(i, {layer.key: (0.2 * a, 0.2 * b)})
    return model


def noise(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return model(sample, torch.tensor([3, 700]), encoder_hidden_states=text).sample


def test_gates_stand_at_the_transformers_and_train(tmp_path: Any) -> None:
    model = mixed()
    gates = [layer.key for layer in model.base_model._layers("default") if layer.update["default"].gate is not None]
    blocks = {key.split(".transformer_blocks")[0] for key in gates}
    assert (
        len(blocks)
        == len(gates)
        == len({k.split(".transformer_blocks")[0] for k in model.base_model.targeted_module_names})
    )
    loss = noise(model.train()).square().mean() + model.base_model.auxiliary_loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    expected = noise(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(noise(PeftModel.from_pretrained(unet(), tmp_path).eval()), expected)


def test_one_of_two_is_the_plain_lora() -> None:
    model, base = mixed().eval(), unet().eval()
    before = noise(model)
    model.base_model.use_loras([1])
    for layer in model.base_model._layers("default"):
        update = layer.update["default"]
        base.get_submodule(layer.key).weight.data += update.B[:, 2:] @ update.A[2:]
    torch.testing.assert_close(noise(model), noise(base), rtol=1e-4, atol=1e-5)
    assert (noise(model) - before).abs().max() > 1e-4
