"""Our own methods against their equations, their parameter counts against the papers', and their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from method_oracles import ORACLES, houlsby, softmax
from oracle import prompts, tiny
from peft import get_peft_model
from test_methods import gradients, inputs, logits, made
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from more_ds.methods import adapter_config
from more_ds.tuners.mixlora import MixLoraFFN
from more_ds.tuners.update import SHARED, UpdateLinear

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "moelora": [{}, {"gate_per_map": True}],
    "dylora": [{}, {"rank": 3}],
    "smora": [{"lora_alpha": 5}],
}
CASES = [(method, options) for method in ORACLES for options in OPTIONS.get(method, [{}])]


class OracleMap(nn.Module):
    """A frozen map plus the oracle's update, with parameters of its own in float64."""

    def __init__(self, base: nn.Module, layer: UpdateLinear, shared: Any, method: str) -> None:
        super().__init__()
        self.base, self.method, self.config = base, method, layer.configs["default"]
        update = layer.update["default"]
        self.leaves = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
        buffers = {name: b.detach().double() for name, b in update.named_buffers()}
        self.numbers = {**buffers, **shared, **self.leaves}

    def forward(self, x: Tensor) -> Tensor:
        output, tasks = self.base(x), prompts()["task_ids"].tolist()
        rows = [
            torch.stack([
                ORACLES[self.method](self.numbers, self.config, x[i, t], tasks[i], output[i, t])
                for t in range(x.shape[1])
            ])
            for i in range(len(x))
        ]  # fmt: skip
        return output + torch.stack(rows)


def with_oracles(model: Any, method: str) -> tuple[nn.Module, dict[str, OracleMap], dict[str, Tensor]]:
    base, maps = tiny("llama").double(), {}
    layer = getattr(model.base_model.model, SHARED, None)
    shared = {} if layer is None else dict(layer.update["default"].named_parameters())
    shared = {name: p.detach().double().requires_grad_() for name, p in shared.items()}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, UpdateLinear):
            parent, _, child = name.rpartition(".")
            maps[name] = OracleMap(base.get_submodule(name), module, shared, method)
            setattr(base.get_submodule(parent), child, maps[name])
    return base, maps, shared


@pytest.mark.parametrize(("method", "options"), CASES)
def test_outputs_and_gradients_are_those_of_the_equations(method: str, options: dict[str, Any]) -> None:
    model = made(method, **options).double()
    if method == "smora":
        for layer in (m for m in model.modules() if isinstance(m, UpdateLinear)):
            layer.update["default"].moves.copy_(torch.linspace(-100, 100, 8))
    base, maps, shared = with_oracles(model, method)
    plain = {key: value for key, value in prompts().items() if key != "task_ids"}
    expected = base(**plain)
    # The task gate is float32 by design where it is not float64; here everything is float64.
    torch.testing.assert_close(logits(model, inputs(method)), expected.logits.detach(), rtol=1e-9, atol=1e-9)
    expected.loss.backward()
    model.zero_grad()
    model.eval()(**inputs(method)).loss.backward()
    found = {name: p.grad for name, p in model.base_model.model.named_parameters() if p.requires_grad}
    for name, oracle in maps.items():
        for leaf, value in oracle.leaves.items():
            torch.testing.assert_close(found[f"{name}.update.default.{leaf}"], value.grad, rtol=1e-7, atol=1e-10)
    for name, value in shared.items():
        torch.testing.assert_close(found[f"{SHARED}.update.default.{name}"], value.grad, rtol=1e-7, atol=1e-10)


def test_dylora_draws_every_rank_and_trains_one_component_when_frozen() -> None:
    model = made("dylora", frozen=True, r=4, target_modules=["q_proj"])
    seen = set()
    for seed in range(40):
        model.zero_grad()
        torch.manual_seed(seed)
        model.train()(**inputs("dylora")).loss.backward()
        drawn = set()
        for layer in (m for m in model.modules() if isinstance(m, UpdateLinear)):
            update = layer.update["default"]
            used = (update.A.grad.abs().sum(1) > 0).nonzero().flatten().tolist()
            assert used == (update.B.grad.abs().sum(0) > 0).nonzero().flatten().tolist()
            assert len(used) == 1
            drawn.add(used[0])
        assert len(drawn) == 1, "one cut for all maps"
        seen |= drawn
    assert seen == {0, 1, 2, 3}


def test_dylora_frozen_has_the_outputs_of_the_whole_prefix() -> None:
    outputs = []
    for frozen in (False, True):
        torch.manual_seed(11)
        outputs.append(made("dylora", frozen=frozen).train()(**inputs("dylora")).loss.detach())
    torch.manual_seed(11)
    assert torch.equal(*outputs)


def test_sora_shrinks_gates_to_exactly_zero_and_drops_them() -> None:
    model = made("sora", threshold=0.5, target_modules=["q_proj"])
    update = next(m for m in model.modules() if isinstance(m, UpdateLinear)).update["default"]
    stepped = update.proximal(torch.tensor([2.0, -2.0, 0.25, -0.5, 0.0, 0.75, 3.0, -0.25]))
    assert stepped.tolist() == [1.5, -1.5, 0.0, 0.0, 0.0, 0.25, 2.5, 0.0]
    update.g.data.copy_(stepped)
    a, b = update.factors(0, None)
    assert a.shape[0] == b.shape[1] == 4
    torch.testing.assert_close(b @ a, 2.0 * update.B @ torch.diag(update.g) @ update.A)


def test_smora_moves_its_bias_against_the_use() -> None:
    model = made("smora", target_modules=["q_proj"])
    update = next(m for m in model.modules() if isinstance(m, UpdateLinear)).update["default"]
    gradients(model, inputs("smora"))
    tokens = inputs("smora")["input_ids"].numel()
    assert update.used.sum() == 3 * tokens
    update.balance(torch.tensor([5, 1, 3, 3, 3, 3, 6, 0]))
    assert update.moves.tolist() == [-1, 1, 0, 0, 0, 0, -1, 1]
    assert update.used.sum() == 0


def t5_base() -> Any:
    return T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)


def llama_7b() -> Any:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaConfig(**sizes, vocab_size=32000)


def trained(method: str, config: Any, **options: Any) -> int:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with init_empty_weights():
        model = get_peft_model(auto.from_config(config), adapter_config(method, options, ["t"] * 8, config))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


T5_MAPS = 12 * (12 * [(768, 768)] + 2 * [(768, 3072), (3072, 768)])
"""(in, out) of q, k, v, o, wi, wo of twelve encoder and decoder layers, cross-attention included: 192 maps."""
LLAMA_MAPS = 32 * (4 * [(4096, 4096)] + 2 * [(4096, 11008)] + [(11008, 4096)])

FORMULAS = {
    "lora": ({"r": 8}, lambda d, m: 8 * (d + m), 0),
    "more": ({"r": 8}, lambda d, m: 8 * (d + m) + d * 8 + 8 * d + 8, 0),
    "multilora": ({"r": 8, "branches": 4}, lambda d, m: 4 * (8 * (d + m) + m), 0),
    "moelora": ({"r": 16}, lambda d, m: 16 * (d + m), 8 * 64 + 64 * 8),
    "moelora in every map": (
        {"r": 8, "gate_per_map": True, "task_dim": 768}, lambda d, m: 8 * (d + m) + 768 * (8 + 8), 0
    ),
    "mtl_lora": ({"r": 8}, lambda d, m: 8 * d + 3 * 8 * m + 8 * (64 + 3), 0),
    "hydralora": ({"r": 4}, lambda d, m: 4 * d + 4 * 4 * m + 4 * d, 0),
    "smora": ({"r": 64}, lambda d, m: 64 * (d + m) + 64 * d, 0),
    "dylora": ({"r": 8}, lambda d, m: 8 * (d + m), 0),
    "sora": ({"r": 8}, lambda d, m: 8 * (d + m) + 8, 0),
    "bitfit": ({}, lambda d, m: m, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", ["t5_base", pytest.param("llama_7b", marks=pytest.mark.slow)])
def test_parameters_are_those_of_the_formula(name: str, size: str) -> None:
    options, per_map, once = FORMULAS[name]
    config, maps = (t5_base(), T5_MAPS) if size == "t5_base" else (llama_7b(), LLAMA_MAPS)
    expected = sum(per_map(d, m) for d, m in maps) + once
    assert trained(name.split()[0], config, **options) == expected
    if (name, size) == ("lora", "t5_base"):
        assert expected == 3_244_032, "the count in the fact sheet"


def test_parameters_of_adapters_on_t5_base() -> None:
    """24 after self-attention and 24 after the FFN; cross-attention has none."""
    assert trained("houlsby", t5_base()) == 48 * (2 * 24 * 768 + 24 + 768)


def test_mixlora_is_whole_ffns_mixed_and_its_balance_is_over_real_tokens() -> None:
    model = made("mixlora", lora_alpha=6, balance=0.5).double()
    config = model.active_peft_config
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    layers = {m.key: m for m in model.modules() if isinstance(m, MixLoraFFN)}
    assert len(layers) == 2
    for key, layer in layers.items():
        layer.register_forward_hook(lambda _, given, found, key=key: seen.update({key: (given[0], found)}))
    batch = inputs("mixlora")
    loss = model.train()(**batch).loss
    scale, use, mass = config.lora_alpha / config.r, torch.zeros(4).double(), torch.zeros(4).double()
    for key, layer in layers.items():
        p = dict(layer.update["default"].named_parameters())
        base = layer.base_layer

        def expert(h: Tensor, e: int, p: dict[str, Tensor] = p, base: Any = base) -> Tensor:
            block = slice(e * config.r, (e + 1) * config.r)
            weight = {
                name: getattr(base, f"{name}_proj").weight + scale * p[f"{name}_B"][:, block] @ p[f"{name}_A"][block]
                for name in ("gate", "up", "down")
            }
            gated = weight["gate"] @ h
            return weight["down"] @ (gated * torch.sigmoid(gated) * (weight["up"] @ h))

        for i, t in batch["attention_mask"].nonzero().tolist():
            h, found = seen[key][0][i, t], seen[key][1][i, t]
            chances = softmax(p["router"] @ h)
            best = sorted(range(4), key=lambda e: -chances[e].item())[:2]
            expected = sum(chances[e] * expert(h, e) for e in best) / sum(chances[e] for e in best)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            use[best] += 1
            mass += chances.detach()
    tokens = 2 * int(batch["attention_mask"].sum())
    expected = 0.5 * 4 * sum(u / tokens * q / tokens for u, q in zip(use, mass, strict=True))
    torch.testing.assert_close(model.losses["balance"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, model.losses["lm"] + model.losses["balance"])
    loss.backward()
    assert all(layer.update["default"].router.grad.abs().max() > 0 for layer in layers.values())


def test_mixlora_without_attention_is_the_layout_of_the_more_papers_table() -> None:
    """r = 8 and n = 8 on wi and wo with a router, no LoRA in the attention: 11.94 M for eight tasks."""
    found = trained("mixlora", t5_base(), r=8, attention=False)
    assert found == 24 * (2 * 8 * 8 * (768 + 3072) + 768 * 8)
    assert round(found / 8e6, 2) == 1.49, "a task's share in the table"


@pytest.mark.parametrize("plus_plus", [True, False])
def test_hyperformer_writes_the_adapters_of_the_equations(plus_plus: bool) -> None:
    model = made("hyperformer", "t5", plus_plus=plus_plus).double()
    seen: dict[str, Tensor] = {}
    layers = [m for m in model.modules() if isinstance(m, UpdateLinear)]
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda *args, key=layer.key: seen.update({f"{key} in": args[2]}))
        layer.register_forward_hook(lambda *args, key=layer.key: seen.update({f"{key} out": args[2]}))
    batch = inputs("hyperformer", "t5")
    logits(model, batch)
    p = dict(getattr(model.base_model.model, SHARED).update["default"].named_parameters())
    assert len(layers) == 8, "two blocks of two layers, each with self-attention and FFN"
    for layer in layers:
        block, _, number, *_ = layer.key.split(".")
        kind = int("DenseReluDense" in layer.key)
        net = f"networks.{block if plus_plus else block + '_' + ('attention', 'ffn')[kind]}"
        for i, task in enumerate(batch["task_ids"].tolist()):
            e = [p["task"][task], p[f"{net}.layer"][int(number)], *([p[f"{net}.kind"][kind]] if plus_plus else [])]
            h = torch.relu(p[f"{net}.mix.0.weight"] @ torch.cat(e) + p[f"{net}.mix.0.bias"])
            h = p[f"{net}.mix.2.weight"] @ h + p[f"{net}.mix.2.bias"]
            h = (h - h.mean()) / torch.sqrt(h.var(unbiased=False) + 1e-5)
            h = h * p[f"{net}.mix.3.weight"] + p[f"{net}.mix.3.bias"]
            w = {
                part: p[f"{net}.write.{part}.weight"] @ h + p[f"{net}.write.{part}.bias"]
                for part in ("down", "down_bias", "up", "up_bias", "gain", "shift")
            }
            w |= {"down": w["down"].view(4, 16), "up": w["up"].view(16, 4)}
            for o, found in zip(seen[f"{layer.key} in"][i], seen[f"{layer.key} out"][i], strict=True):
                y = houlsby(w, None, o, 0, o)
                y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5)
                torch.testing.assert_close(found, o + w["gain"] * y + w["shift"], rtol=1e-6, atol=1e-8)


def test_parameters_of_hyperformer_on_t5_base() -> None:
    """The fact sheet's 5.16 M and 10.2 M: what the networks write for one adapter, from 64 numbers and a bias."""
    adapter = 65 * (2 * 24 * 768 + 24 + 3 * 768)
    mix = lambda n: n * 64 * 128 + 128 + 128 * 64 + 64 + 128  # noqa: E731
    assert trained("hyperformer", t5_base()) == 2 * (adapter + mix(3) + 14 * 64) + 8 * 64
    assert round(trained("hyperformer", t5_base()) / 1e6, 2) == 5.16
    assert trained("hyperformer", t5_base(), plus_plus=False) == 4 * (adapter + mix(2) + 12 * 64) + 8 * 64
