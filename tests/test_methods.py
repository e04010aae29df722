"""What every method owes: a start, exact saving, a way back to the base, merging, gradients, and training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import prompts, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from more_ds.errors import UserError
from more_ds.export.factors import read_adapter
from more_ds.loading import Subject
from more_ds.methods import METHODS, adapter_config
from more_ds.tuners.context import TaskContext

NAMES = sorted(METHODS.keys() - {"full", "mole", "xlora"})
"""All but full fine-tuning, which has no adapter, and what is made of finished LoRAs."""
TASKS = ["a", "b", "c"]
SMALL: dict[str, dict[str, Any]] = {
    "moelora": {"r": 4, "experts": 2, "task_dim": 6, "lora_dropout": 0.0},
    "hyperformer": {"reduction": 4, "task_dim": 8},
    "mixlora": {"r": 4, "experts": 4, "lora_dropout": 0.0},
    "smora": {"r": 8, "top_k": 3},
    "houlsby": {"reduction": 4},
    "vera": {"r": 4, "d_initial": 0.5},
    "poly": {"r": 2},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "spot": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "mpt": {"num_virtual_tokens": 3},
    "attempt": {"num_virtual_tokens": 3, "sources": ["x", "y"], "attention_dim": 5, "temperature": 2.0},
    "adalora": {"init_r": 4, "target_r": 2},
}
STARTS_ELSEWHERE = {
    "houlsby": 0.1, "hyperformer": 1.0, "prompt_tuning": None, "prefix_tuning": None, "spot": None, "p_tuning": None,
    "mpt": None, "attempt": None,
}  # fmt: skip
"""Methods whose start is not the base model: how far they may be, None for anywhere."""


EXPORTED = ["moelora", "mtl_lora", "multilora", "dylora", "sora"]


def made(method: str, kind: str = "llama", trained: bool = True, **options: Any) -> PeftModel:
    base = tiny(kind)
    config = adapter_config(method, {**SMALL.get(method, {}), **options}, TASKS, base.config)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    if trained:
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(method: str, kind: str = "llama", **changes: Any) -> dict[str, Tensor]:
    batch = {**prompts(kind), **changes}
    if not METHODS[method].routes_by_task:
        del batch["task_ids"]
    return {name: value for name, value in batch.items() if value is not None}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def base_logits(kind: str = "llama") -> Tensor:
    batch = prompts(kind)
    del batch["task_ids"]
    return logits(tiny(kind), batch)


def kinds(method: str) -> Iterator[str]:
    yield "llama"
    if method not in ("ia3", "poly"):  # IA3 names no maps of GPT-2, and Poly does not know its Conv1D
        yield "gpt2"
    if "encoder_decoder" not in METHODS[method].refuses:
        yield "t5"


def everywhere(method: str) -> Iterator[Any]:
    """A causal model and, for our own methods, T5; the others are in the long suite."""
    fast = ("llama", "t5") if METHODS[method].config.__module__.startswith("more_ds") else ("llama",)
    for kind in kinds(method):
        yield pytest.param(method, kind, marks=[] if kind in fast else pytest.mark.slow)


EVERYWHERE = [case for method in NAMES for case in everywhere(method)]


def seeded(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    torch.manual_seed(7)
    return model(**batch)


@pytest.mark.parametrize(("method", "kind"), EVERYWHERE)
def test_the_start_is_the_base_model(method: str, kind: str) -> None:
    start = logits(made(method, kind, trained=False), inputs(method, kind))
    base = base_logits(kind)
    assert torch.isfinite(start).all()
    if method not in STARTS_ELSEWHERE:
        torch.testing.assert_close(start, base, rtol=1e-5, atol=1e-5)
    elif STARTS_ELSEWHERE[method] is not None:
        assert 0 < (start - base).abs().max() < STARTS_ELSEWHERE[method]


@pytest.mark.parametrize(("method", "kind"), EVERYWHERE)
def test_saved_and_loaded_to_the_bit(method: str, kind: str, tmp_path: Path) -> None:
    model, batch = made(method, kind), inputs(method, kind)
    if method == "adalora":  # with labels a loaded AdaLoRA of PEFT fails
        labels = batch.pop("labels")
        batch |= {"decoder_input_ids": labels.clamp(min=0)} if kind == "t5" else {}
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), expected)
    if not loaded.active_peft_config.is_prompt_learning:  # PEFT leaves those trainable
        assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("method", NAMES)
def test_disabled_and_unloaded_is_the_base_model(method: str) -> None:
    model = made(method)
    enabled, base = logits(model, inputs(method)), base_logits()
    assert (enabled[:, -base.shape[1] :] - base).abs().max() > 1e-3
    plain = {key: value for key, value in inputs(method).items() if key != "task_ids"}
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, plain), base, rtol=0, atol=0)
    assert torch.equal(logits(model, inputs(method)), enabled)
    if not model.active_peft_config.is_prompt_learning:
        unloaded = model.unload()
        assert torch.equal(logits(unloaded, plain), base)
        assert [n for n, _ in unloaded.named_modules()] == [n for n, _ in tiny("llama").named_modules()]


@pytest.mark.parametrize(("method", "kind"), [case for case in EVERYWHERE if METHODS[case.values[0]].merges != "no"])
def test_merged_equals_unmerged(method: str, kind: str) -> None:
    by_task = METHODS[method].merges == "by task"
    for task in (2, 0) if by_task else (None,):
        model = made(method, kind).double()  # in float32 these random layers blow rounding up, on each CPU another one
        tasks = torch.tensor([task or 0] * 4)
        expected = logits(model, inputs(method, kind, task_ids=tasks))
        options = {"task": task} if by_task else {}
        merged = model.merge_and_unload(**options)
        close = {"rtol": 0, "atol": 1e-9 * float(expected.abs().max())}
        torch.testing.assert_close(logits(merged, inputs("lora", kind)), expected, **close)
        assert not any("update" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("method", [m for m in NAMES if METHODS[m].merges == "no"])
def test_what_cannot_merge_says_so_and_stays_as_it_is(method: str) -> None:
    model = made(method)
    before = logits(model, inputs(method))
    options = {"task": 0} if METHODS[method].routes_by_task and method != "poly" else {}
    with pytest.raises((ValueError, AttributeError, NotImplementedError, TypeError)) as caught:
        model.merge_and_unload(**options)
    if hasattr(model.base_model, "context") and isinstance(model.base_model.context, TaskContext):
        assert "cannot be merged" in str(caught.value)
    assert torch.equal(logits(model, inputs(method)), before)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    seeded(model.train(), batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("method", NAMES)
def test_everything_that_trains_has_a_gradient_and_nothing_else(method: str) -> None:
    model = made(method)
    assert gradients(model, inputs(method)).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    owned = ("update", "lora_", "more_", "vera_", "ia3_", "poly_", "prompt_encoder")
    assert all(any(part in name for part in owned) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [m for m in NAMES if "gradient_checkpointing" not in METHODS[m].refuses])
def test_checkpointing_gives_the_same_gradients(method: str) -> None:
    model = made(method)
    plain = gradients(model, inputs(method))
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again = gradients(model, inputs(method))
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", NAMES)
def test_bfloat16_runs_near_float32(method: str) -> None:
    model = made(method)
    expected = logits(model, inputs(method))
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = logits(low, inputs(method))
    assert found.dtype == torch.bfloat16
    # A router may choose other experts for a token that is near the edge, so most tokens are compared.
    near = (found.float() - expected).abs() < 0.2 * expected.abs().max()
    assert near.float().mean() > 0.9
    assert seeded(low.train(), inputs(method)).loss.isfinite()


@pytest.mark.parametrize("method", NAMES)
def test_training_lowers_the_loss(method: str) -> None:
    model = made(method, trained=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    first = seeded(model.eval(), inputs(method)).loss.item()
    for _ in range(12):
        optimizer.zero_grad()
        model.train()(**inputs(method)).loss.backward()
        optimizer.step()
    assert seeded(model.eval(), inputs(method)).loss.item() < first - 0.02


@pytest.mark.parametrize("method", [m for m in NAMES if METHODS[m].routes_by_task])
def test_every_example_gets_its_own_task(method: str) -> None:
    """A batch of several tasks is what its examples are alone."""
    model = made(method)
    together = logits(model, inputs(method))
    for i in range(4):
        alone = {key: value[i : i + 1] for key, value in inputs(method).items()}
        torch.testing.assert_close(logits(model, alone)[0], together[i], rtol=1e-4, atol=1e-4)
    others = inputs(method, task_ids=torch.tensor([0, 1, 1, 2]))
    assert (logits(model, others) - together).abs().amax((1, 2)).min() > 1e-5


@pytest.mark.parametrize("method", [m for m in NAMES if m not in ("prefix_tuning", "adalora")])  # PEFT allows one
def test_two_adapters_keep_apart(method: str) -> None:
    model = made(method)
    if model.active_peft_config.is_prompt_learning:
        pytest.skip("PEFT's prompts cannot share a model")
    first = logits(model, inputs(method))
    options = {**SMALL.get(method, {}), **({"projection_prng_key": 0} if method == "vera" else {})}
    model.add_adapter("other", adapter_config(method, options, TASKS, model.get_base_model().config))
    assert torch.equal(logits(model, inputs(method)), first)
    model.set_adapter("other")
    assert (logits(model, inputs(method)) - first).abs().max() > 1e-3
    assert all("other" in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model, inputs(method)), first)


@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in EXPORTED), ("moelora", {"gate_per_map": True}), ("dylora", {"rank": 3})]
)
def test_exported_factors_are_the_update(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = made(method, **options)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(Subject("x", "base", tmp_path, PeftConfig.from_pretrained(tmp_path)))
    for task in range(len(adapter.task_names)):
        model.base_model.merge_adapter(task=task)
        merged = {name: p.detach().clone() for name, p in model.get_base_model().named_parameters()}
        model.base_model.unmerge_adapter()
        base = dict(model.get_base_model().named_parameters())
        for name, (a, b) in adapter.factors(task).items():
            key = f"{name}.base_layer.weight"
            torch.testing.assert_close(merged[key] - base[key], b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["hydralora", "houlsby", "bitfit", "smora"])
def test_what_is_no_low_rank_update_is_not_exported(method: str, tmp_path: Path) -> None:
    made(method).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be written as a LoRA"):
        read_adapter(Subject("x", "base", tmp_path, PeftConfig.from_pretrained(tmp_path))).factors(0)
