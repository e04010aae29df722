"""MoRE on experts whose weights are stacked in one module, against the equations and against merged weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from moe_models import literal_of, moe
from oracle import Batch, adapted, oracle_of, prompts, scramble
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from more_ds import MoreConfig, checkpoint
from more_ds.config import RunConfig
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, set_learning_rate, start
from more_ds.losses import IGNORED
from more_ds.tuners.more.grouped import Routing, grouped_linear
from more_ds.tuners.more.nearest import similarities
from more_ds.tuners.more.stacked import MoreExperts, StackedMap

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
KINDS = ("mixtral", "qwen3_moe", "gpt_oss")


def more(kind: str = "mixtral", base: Any = None, **switches: Any) -> Any:
    switches = {"target_modules": "attention+ffn", **switches}
    return adapted("llama", moe(kind) if base is None else base, **switches)


@torch.no_grad()
def logits(model: Any, **changes: Any) -> Tensor:
    batch = {**prompts(), **changes}
    return model(**{name: value for name, value in batch.items() if value is not None}).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODELS = [
    ("mixtral", {}, {}),
    ("mixtral", {"num_experts_per_tok": 1}, {"task_dim": 5, "backend": "reference"}),
    ("mixtral", {}, {"gate": "soft", "target_modules": "ffn"}),
    ("qwen3_moe", {"norm_topk_prob": True}, {"backend": "eager"}),
    ("qwen3_moe", {"norm_topk_prob": False}, {"gate": "frozen", "contrastive_weight": 0.0}),
    ("qwen3_moe", {}, {"target_modules": ["q_proj", "experts.down_proj"]}),
    ("gpt_oss", {}, {"target_modules": "ffn"}),
]


@pytest.mark.parametrize(("kind", "changes", "switches"), MODELS)
def test_model_equals_the_equations(kind: str, changes: dict[str, Any], switches: dict[str, Any]) -> None:
    base = moe(kind, **changes).double()
    literal_model = copy.deepcopy(base)
    model = more(kind, base, temperature=0.5, **switches).train()
    batch = prompts()
    embedded = base.get_input_embeddings()(batch.pop("input_ids")).detach()
    embeddings = [embedded.clone().requires_grad_() for _ in range(2)]
    prompt = batch["attention_mask"] * (batch["labels"] == IGNORED)
    told = Batch(batch["task_ids"].tolist(), prompt.tolist(), [])
    experts, maps = literal_of(model, literal_model, told), oracle_of(model, literal_model, told)
    assert len(experts) == 2

    ours = model(inputs_embeds=embeddings[0], **batch)
    del batch["task_ids"]
    literal = literal_model(inputs_embeds=embeddings[1], **batch)
    terms = [own.term for own in maps.values() if own.term is not None]
    terms += [term for own in experts.values() for term in own.terms]
    weight = switches.get("contrastive_weight", 0.1)
    loss = literal.loss + (weight * sum(terms) / len(terms) if weight else 0.0)
    torch.testing.assert_close(ours.logits, literal.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, loss, **CLOSE, check_dtype=False)

    ours.loss.backward()
    loss.backward()
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, **CLOSE)
    seen = 0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, StackedMap):
            literal_map = experts[name.rpartition(".")[0]].literal[layer.parameter_name]
            for key, p in layer.named_parameters():
                expected = literal_map.leaves[key].grad
                if expected is None:
                    assert p.grad is None or not p.grad.any(), key
                else:
                    torch.testing.assert_close(p.grad, expected, **CLOSE, msg=lambda m, n=key: f"{n}: {m}")
                    seen += 1
    assert seen >= 2 * 2


def test_the_adapter_alone_gets_gradients() -> None:
    model = more().train()
    model(**prompts()).loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".more_" not in name)
    assert all(p.grad is not None for name, p in model.named_parameters() if ".more_A." in name)


class _Experts(nn.Module):
    """Experts of a class of its own for every way in which weights can lie."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, width, inner = 3, 6, 4
        first = inner * (2 if config.gated else 1)
        shape = (lambda o, i: (3, i, o)) if config.transposed else (lambda o, i: (3, o, i))
        name = "gate_up_proj" if config.gated else "up_proj"
        for key, sizes in ((name, (first, width)), ("down_proj", (width, inner))):
            setattr(self, key, nn.Parameter(torch.randn(shape(*sizes))))
            if config.biased:
                setattr(self, f"{key}_bias", nn.Parameter(torch.randn(3, sizes[0])))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise AssertionError("the interface decides")


@pytest.mark.parametrize("flags", range(16))
def test_weights_may_lie_in_any_way_of_the_contract(flags: int) -> None:
    transposed, biased, gated, normed = (bool(flags >> i & 1) for i in range(4))
    options = {"transposed": transposed, "biased": biased, "gated": gated, "_experts_implementation": "batched_mm"}
    kind = use_experts_implementation(
        is_transposed=transposed, has_bias=biased, has_gate=gated, has_post_expert_norm=normed
    )(type("Experts", (_Experts,), {"forward": lambda *_: None}))
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("experts", kind(type("Config", (), options)))
    inputs = torch.randn(8, 6), torch.randint(3, (8, 2)), torch.rand(8, 2)
    plain = base.experts(*inputs)
    first = "gate_up_proj" if gated else "up_proj"
    config = MoreConfig(r=4, num_tasks=2, target_modules=[f"experts.{first}", "down_proj"])
    model: Any = get_peft_model(base, config).eval()
    assert set(model.base_model.ranks()) == {f"experts.{first}", "experts.down_proj"}
    experts = model.base_model.model.experts
    context = experts.maps[0].context
    context.begin(torch.tensor([0, 1, 1, 0]), None, None)
    torch.testing.assert_close(experts(*inputs), plain, rtol=1e-4, atol=1e-4)
    scramble(model)
    adapted_outputs = experts(*inputs)
    for task, rows in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        model.merge_adapter(task=task)
        torch.testing.assert_close(experts(*inputs)[rows], adapted_outputs[rows], rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    assert not torch.allclose(adapted_outputs, plain, atol=1e-2)
    assert torch.equal(model.unload().experts(*inputs), plain)


def test_experts_that_no_token_has_chosen() -> None:
    routing = Routing(torch.tensor([[3, 0], [3, 0]]), 4)
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, 3, requires_grad=True)
    y = grouped_linear(x, weight, routing)
    torch.testing.assert_close(y, torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[3].T]))
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[1:3].any()
    assert weight.grad[[0, 3]].any()
    torch.testing.assert_close(routing.combined(x, torch.ones(2, 2)), x[[0, 1]] + x[[2, 3]])


def test_one_kernel_for_all_experts_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU torch has the kernel too, and it stands in for that of GPUs."""
    found = []
    for has_kernel in (False, True):
        monkeypatch.setattr("more_ds.tuners.more.grouped._has_kernel", lambda *_, own=has_kernel: own)
        generator = torch.Generator().manual_seed(0)
        routing = Routing(torch.tensor([[3, 0], [3, 0], [0, 1]]), 4)
        for transposed in (False, True):
            x = torch.randn(6, 8, generator=generator).requires_grad_()
            weight = torch.randn(4, *((8, 16) if transposed else (16, 8)), generator=generator).requires_grad_()
            y = grouped_linear(x, weight, routing, transposed)
            (y * torch.randn(y.shape, generator=generator)).sum().backward()
            found.append((y.detach(), x.grad, weight.grad))
    for one, other in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_at_initialisation_disabled_and_unloaded(kind: str) -> None:
    expected = logits(moe(kind), task_ids=None)
    fresh = adapted("llama", moe(kind), trained=False, target_modules="ffn")
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-4, atol=1e-4)
    model = more(kind)
    assert (logits(model) - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, task_ids=None), expected)
    plain = model.unload()
    assert torch.equal(logits(plain, task_ids=None), expected)
    assert not any(isinstance(m, (MoreExperts, StackedMap)) for m in plain.modules())
    assert "forward" not in vars(plain.model.layers[0].mlp.experts)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_one_example_at_a_time(kind: str) -> None:
    model, batch = more(kind), prompts()
    together = logits(model)
    for i in range(4):
        length = int(batch["attention_mask"][i].sum())
        one = {name: value[i : i + 1] for name, value in batch.items()}
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask", "labels")}
        torch.testing.assert_close(logits(model, **one)[0], together[i, :length], rtol=1e-4, atol=1e-4)
    model.train()
    model.base_model.set_task(2)
    same = {**batch, "task_ids": torch.tensor([2] * 4)}
    del batch["task_ids"]
    torch.testing.assert_close(model(**batch).loss, model(**same).loss)


def test_generation_is_greedy_decoding_of_the_full_forward() -> None:
    model = more("qwen3_moe")
    ids, tasks = prompts()["input_ids"][[0, 3], :5], torch.tensor([2, 1])
    with torch.no_grad():
        out = model.generate(input_ids=ids, task_ids=tasks, max_new_tokens=3, do_sample=False, eos_token_id=None)
        for _ in range(3):
            following = model(input_ids=ids, task_ids=tasks).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("gate", ["ste", "soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_comes_out_to_the_bit(kind: str, gate: str) -> None:
    model = more(kind, gate=gate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for task in range(3):
        tasks = torch.tensor([task] * 4)
        unmerged = logits(model, task_ids=tasks)
        model.merge_adapter(task=task, safe_merge=True)
        torch.testing.assert_close(logits(model, task_ids=tasks), unmerged, rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for layer in (m for m in model.modules() if isinstance(m, StackedMap)):
        layer._disable_adapters = False
        delta = layer.get_delta_weight("default", 1)
        assert delta.shape == layer._weight().shape
    expected = logits(model, task_ids=torch.tensor([1] * 4))
    plain = model.merge_and_unload(task=1)
    torch.testing.assert_close(logits(plain, task_ids=None), expected, rtol=1e-3, atol=1e-3)


def test_a_broken_adapter_is_not_merged() -> None:
    model = more()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".more_" not in name}
    layer = [m for m in model.modules() if isinstance(m, StackedMap)][-1]
    layer.more_A["default"].weight.data[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(task=0, safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_to_the_bit(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    config = MoreConfig(r=4, num_tasks=3, target_modules="attention+ffn", task_type="CAUSAL_LM")
    model: Any = get_peft_model(moe().to(dtype), config, autocast_adapter_dtype=False)
    second = MoreConfig(r=2, num_tasks=3, target_modules="ffn", task_type="CAUSAL_LM")
    model.add_adapter("other", second, autocast_adapter_dtype=False)
    scramble(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".more_")[1].split(".")[0] for key in saved} == {"A", "B", "gate", "task", "ranks"}
    assert not any("other" in key for key in saved)
    key = "base_model.model.model.layers.1.mlp.experts.down_proj.more_A.weight"
    assert saved[key].shape == (4, 4, 24)
    assert saved[key].dtype == dtype
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.experts.gate_up_proj" in written["target_parameters"]

    switches = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        loaded = PeftModel.from_pretrained(moe().to(dtype), tmp_path, **switches).eval()
        other = PeftModel.from_pretrained(moe().to(dtype), tmp_path / "other", **switches).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    model.set_adapter("other")
    assert torch.equal(logits(other), logits(model))


def test_several_adapters_live_together() -> None:
    model = more()
    first = logits(model)
    model.add_adapter("other", MoreConfig(r=2, num_tasks=3, target_modules=["experts.down_proj"]))
    assert len(model.base_model.ranks("other")) == 2
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    scramble(model)
    second = logits(model)
    assert (second - first).abs().max() > 1e-2
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), second)
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("other")
    assert not any(".other." in name for name, _ in model.named_parameters())
    assert (logits(model) - second).abs().max() > 1e-2
    assert torch.equal(logits(twin), second)
    model.base_model.delete_adapter("default")
    assert torch.equal(logits(model.unload(), task_ids=None), logits(moe(), task_ids=None))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_gradient_checkpointing(kind: str) -> None:
    plain, checkpointed = more(kind, lora_dropout=0.3).train(), more(kind, lora_dropout=0.3).train()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    experts = [m for m in checkpointed.modules() if isinstance(m, MoreExperts)]
    experts[0].register_forward_pre_hook(lambda *_: calls.append(1))
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        loss = model(**prompts()).loss
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2
    torch.testing.assert_close(*losses)
    expected, found = gradients(plain), gradients(checkpointed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_dropout_reads_a_again_and_the_base_as_it_is() -> None:
    model = more(lora_dropout=0.5, contrastive_weight=0.0, target_modules="ffn").train()
    outputs = [model(**prompts()).logits for _ in range(2)]
    assert not torch.equal(*outputs)
    torch.testing.assert_close(logits(model.eval()), logits(more(target_modules="ffn")))


def test_half_precision() -> None:
    exact = more(contrastive_weight=0.0)
    rounded = more(contrastive_weight=0.0, base=moe().bfloat16()).bfloat16()
    for model in (exact, rounded):
        for own in (m for m in model.modules() if isinstance(m, StackedMap)):
            own.ranks("default")
    expected = logits(exact)
    difference = (logits(rounded).float() - expected).abs().max() / expected.abs().max()
    assert difference < 0.05
    rounded.train()(**prompts()).loss.backward()
    assert all(p.grad.isfinite().all() for p in rounded.parameters() if p.grad is not None)
    mixed = more(base=moe().bfloat16())  # parameters in float32 on a base in bfloat16, as PEFT leaves them
    assert mixed.base_model.model.model.layers[0].mlp.experts.maps[0].more_A["default"].weight.dtype == torch.float32
    mixed.train()(**prompts()).loss.backward()


def test_gate_trains() -> None:
    model = adapted("llama", moe("qwen3_moe"), trained=False, target_modules="ffn").train()
    gates = {name: p for name, p in model.named_parameters() if ".more_gate." in name}
    before = {name: p.detach().clone() for name, p in gates.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = model(**prompts()).loss
        loss.backward()
        if step == 0:
            assert not any(p.grad.any() for name, p in gates.items())  # B is zero
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((gates[name] - before[name]).abs().max() > 1e-3 for name in gates)
    ranks = model.base_model.ranks()
    model.eval()
    for layer in (m for m in model.modules() if isinstance(m, StackedMap)):
        chosen = layer._gate("default", layer.more_task["default"]()).argmax(-1) + 1
        assert torch.equal(ranks[layer.key], chosen)


def test_a_task_is_added_and_trained_alone() -> None:
    model = more(task_names=["a", "b", "c"])
    before = logits(model)
    assert model.base_model.add_task("d", init_from="b") == 3
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model, task_ids=torch.tensor([3] * 4)), logits(model, task_ids=torch.tensor([1] * 4)))
    model.base_model.train_task("d")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("added_0")}
    assert any(".experts.gate_up_proj." in name for name in trained)
    model.train()(**{**prompts(), "task_ids": torch.tensor([3] * 4)}).loss.backward()


def test_prompts_are_compared_with_the_tasks_of_every_map() -> None:
    model = more(temperature=0.5)
    with similarities(model.base_model) as seen:
        logits(model, labels=None)
    assert len(seen) == 12
    assert all(cosines.shape == (4, 3) for cosines in seen.values())


DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
SETUPS: dict[str, Any] = {
    "zero2": "zero2.json",
    "zero3": "zero3.json",
    "zero3, nothing whole": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def trained_tensors(ranks: Ranks, setup: str, folder: Path) -> dict[str, Any]:
    """Three steps on four examples, those of a rank of one task; the tensors that a checkpoint would hold."""
    zero = SETUPS[setup]
    path = DS_CONFIGS / zero if isinstance(zero, str) else folder / f"ds-{ranks.rank}-{ranks.world}.json"
    if not isinstance(zero, str):
        path.write_text(json.dumps({"zero_optimization": zero}))
    config = RunConfig(train_batch_size=4, learning_rate=1e-2)
    ds_config = resolve(str(path), config, batch_sizes(config, ranks.world), "fp32")
    torch.manual_seed(0)
    switches = {"r": 3, "lora_alpha": 8, "num_tasks": 3, "task_dim": 5, "task_type": "CAUSAL_LM"}
    model = get_peft_model(moe(), MoreConfig(**switches, target_modules="attention+ffn"))
    engine = start(model, config, ds_config, ranks)
    engine.train()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 40, (4, 6), generator=generator)
        tasks = torch.tensor([step, step, step + 1, step + 1]) % 3
        own = slice(4 // ranks.world * ranks.rank, 4 // ranks.world * (ranks.rank + 1))
        set_learning_rate(engine, 1e-2)
        engine.backward(engine(input_ids=ids[own], labels=ids[own], task_ids=tasks[own]).loss)
        engine.step()
    return {name: tensor.numpy() for name, tensor in checkpoint.adapter_tensors(engine).items()}


@pytest.mark.parametrize("setup", SETUPS)
def test_two_ranks_on_different_tasks_train_as_one_process(setup: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(trained_tensors, 1, setup, tmp_path)
    both = run_ranks(trained_tensors, 2, setup, tmp_path)
    assert any("experts.down_proj.more_B" in name for name in alone)
    for found in both:
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            assert abs(expected).any(), name
            torch.testing.assert_close(
                torch.from_numpy(found[name]), torch.from_numpy(expected), rtol=1e-3, atol=2e-5, msg=name
            )
