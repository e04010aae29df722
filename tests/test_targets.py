"""Words for the maps that a method adapts: `attention`, `ffn`, and both, in models that name them in their own ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import base_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

from more_ds import MoreConfig
from more_ds.errors import UserError
from more_ds.methods import adapter_config
from more_ds.model import attach
from more_ds.tuners.linear import name_targets

MAPS = {
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    "t5": ({"q", "k", "v", "o"}, {"wi", "wo"}),
    "gpt2": ({"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "phi3": ({"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16))
    if kind == "phi3":
        return Phi3ForCausalLM(Phi3Config(**sizes, intermediate_size=32, num_key_value_heads=2, pad_token_id=0))
    return base_model(kind)


@pytest.mark.parametrize("kind", MAPS)
def test_the_words_divide_the_maps_of_the_blocks(kind: str) -> None:
    found = {}
    for words in ("attention", "ffn", "attention+ffn"):
        model = attach(model_of(kind), MoreConfig(num_tasks=2, target_modules=words, task_type="CAUSAL_LM"))
        found[words] = set(model.base_model.targeted_module_names)
    for words, wanted in zip(("attention", "ffn"), MAPS[kind], strict=True):
        assert {name.rpartition(".")[2] for name in found[words]} == wanted
    assert not found["attention"] & found["ffn"]
    assert found["attention"] | found["ffn"] == found["attention+ffn"]
    assert not any("lm_head" in name or "embed" in name for name in found["attention+ffn"])


def test_a_fused_projection_computes_as_the_maps_it_holds() -> None:
    base = model_of("phi3").eval()
    ids = torch.randint(0, 64, (2, 7))
    expected = base(input_ids=ids).logits
    config = MoreConfig(num_tasks=2, target_modules="attention+ffn", task_type="CAUSAL_LM", init_weights=False)
    model = attach(base, config).eval()
    tasks = torch.tensor([0, 1])
    adapted = model(input_ids=ids, task_ids=tasks).logits
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    merged = model.merge_and_unload(task=1)
    torch.testing.assert_close(merged(input_ids=ids[1:]).logits, adapted[1:], rtol=1e-4, atol=1e-5)


def test_a_second_adapter_and_pefts_own_methods_know_the_words() -> None:
    model = get_peft_model(base_model("llama"), MoreConfig(num_tasks=2, target_modules="attention"))
    model.add_adapter("other", MoreConfig(num_tasks=2, target_modules="ffn"))
    assert {n.rpartition(".")[2] for n in model.base_model.targeted_module_names} >= MAPS["llama"][1]
    base = base_model("llama")
    config = adapter_config("lora", {"target_modules": "attention"}, ["a"], base.config)
    name_targets(config, base)
    assert isinstance(config, LoraConfig)
    assert {name.rpartition(".")[2] for name in config.target_modules or ()} == MAPS["llama"][0]


def test_a_model_without_such_maps_is_refused() -> None:
    with pytest.raises(UserError, match="the model has no such maps"):
        attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), MoreConfig(num_tasks=2, target_modules="attention"))
