"""The last block's feed-forward network runs for the tokens that are read, and no score changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_models import moe
from test_methods import made
from test_scoring import flat
from tiny_models import text_model, tokenizer
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from more_ds.data.encoding import Encoder
from more_ds.scoring.last_block import for_the_last
from more_ds.scoring.likelihood import rank_options
from more_ds.text_model import TextModel

PROMPTS, OPTIONS = [[1, 5, 6, 7, 8, 9], [1, 5], [1, 9, 8, 7]], [[[11, 2], [12, 13, 2]], [[4, 4, 2]], [[5, 2], [6, 2]]]


def around(model: nn.Module) -> TextModel:
    encoder = Encoder(tokenizer(False), is_encoder_decoder=False, max_source_length=40, max_target_length=8)
    return TextModel(model, encoder)


def seen(model: TextModel, names: list[str]) -> dict[str, list[int]]:
    """Tokens a row that the named modules are given while the options are scored."""
    found: dict[str, list[int]] = {name: [] for name in names}
    handles = []
    for name in names:
        part = model.base.get_submodule(name)
        own = found[name]
        handles.append(part.register_forward_hook(lambda _m, a, _o, own=own: own.append(a[0].shape[1])))
    rank_options(model, PROMPTS, [0, 0, 0], OPTIONS)
    for handle in handles:
        handle.remove()
    return found


def test_the_last_network_sees_the_end_of_the_prompt_and_the_answers() -> None:
    nodes = 3  # 11, 12 and 13 of the first row
    whole = max(map(len, PROMPTS)) + nodes
    names = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.self_attn.o_proj"]
    found = seen(text_model("llama"), names)
    assert found == dict(zip(names, ([whole], [nodes + 1], [whole]), strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_in_the_place_of_a_network(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some give back how they routed beside what they computed."""
    model = around(moe(kind))
    assert seen(model, ["model.layers.0.mlp", "model.layers.1.mlp"]).popitem()[1] == [4]
    found = flat(rank_options(model, PROMPTS, [0, 0, 0], OPTIONS))
    monkeypatch.setattr("more_ds.scoring.likelihood.takes_trees", lambda _: False)
    torch.testing.assert_close(found, flat(rank_options(model, PROMPTS, [0, 0, 0], OPTIONS)), atol=1e-5, rtol=1e-5)


def test_hooks_are_gone_afterwards_and_after_an_error() -> None:
    model = text_model("llama")
    network = model.base.model.layers[-1].mlp
    x = torch.randn(2, 9, model.config.hidden_size)
    whole = network(x)
    with for_the_last(model, 4):
        torch.testing.assert_close(network(x)[:, -4:], whole[:, -4:])
        assert not network(x)[:, :-4].any()
        assert torch.equal(network(x=x), whole)
    assert torch.equal(network(x), whole)
    with pytest.raises(TypeError), for_the_last(model, 4):
        network(x, "one too many")
    assert torch.equal(network(x), whole)


def test_other_models_run_whole_rows() -> None:
    """A network of another name, and adapters that weigh a token by others."""
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    for model in (around(OPTForCausalLM(OPTConfig(vocab_size=40, word_embed_proj_dim=16, **sizes))), text_model("t5")):
        hooks = [m for m in model.base.modules() if m._forward_pre_hooks]
        with for_the_last(model, 1):
            assert [m for m in model.base.modules() if m._forward_pre_hooks] == hooks
    model = around(made("lora"))
    model.takes_cache = False
    assert seen(model, ["model.layers.1.mlp"]) == {"model.layers.1.mlp": [9]}
