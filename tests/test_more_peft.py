"""MoRE does what PEFT's own tuners do: PEFT's conformance tests, with tasks."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import adapted, prompts, scramble, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from more_ds import MoreConfig
from more_ds.tuners.more import MoreLinear

KINDS = ("llama", "gpt2", "t5")


def logits(model: nn.Module, kind: str = "llama", **changes: object) -> Tensor:
    batch = {**prompts(kind), **changes}
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if value is not None}).logits


def base_logits(model: nn.Module, kind: str) -> Tensor:
    return logits(model, kind, task_ids=None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_tasks_begin_with_all_ranks_and_may_leave_them() -> None:
    model = adapted("llama", trained=False, init_rank="full")
    assert all(ranks.tolist() == [model.peft_config["default"].r] * 3 for ranks in model.ranks().values())
    for layer in model.modules():
        if isinstance(layer, MoreLinear):
            torch.nn.init.zeros_(layer.more_gate["default"].bias)
            layer.stale["default"] = True
    assert any(len(ranks.unique()) > 1 for ranks in model.ranks().values())


@pytest.mark.parametrize("kind", KINDS)
def test_identity_at_initialisation(kind: str) -> None:
    base = base_logits(tiny(kind), kind)
    assert torch.equal(logits(adapted(kind, trained=False), kind), base)
    away = logits(adapted(kind, trained=False, init_weights=False), kind)
    assert (away - base).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_equals_base(kind: str) -> None:
    model, base = adapted(kind), base_logits(tiny(kind), kind)
    enabled = logits(model, kind)
    assert (enabled - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(base_logits(model, kind), base)
    assert torch.equal(logits(model, kind), enabled)
    assert torch.equal(base_logits(model.unload(), kind), base)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(kind: str) -> None:
    model = adapted(kind).train()
    before = weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**prompts(kind)).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".more_" in name}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_to_the_bit(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    config = MoreConfig(r=4, num_tasks=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama").to(dtype), config, autocast_adapter_dtype=False)
    scramble(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".more_")[1].split(".")[0] for key in saved} == {"A", "B", "gate", "task", "ranks"}
    assert {value.dtype for value in saved.values()} == {dtype, torch.long}

    switches = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path, **switches).eval()
    assert torch.equal(logits(loaded), expected)
    assert same(loaded.ranks(), model.ranks())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())


def test_evaluation_uses_the_table_of_the_checkpoint(tmp_path: Path) -> None:
    """A gate whose two best experts tie in bfloat16 would choose another rank than the one trained with."""
    model = adapted("llama", trained=False)
    for layer in (m for m in model.modules() if isinstance(m, MoreLinear)):
        layer.more_gate["default"].weight.data.zero_()
        layer.more_gate["default"].bias.data = torch.tensor([1.0, 1.001, 0.0, 0.0])
        nn.init.normal_(layer.more_B["default"].weight)
        layer.stale["default"] = True
    expected = logits(model)
    assert all(table.tolist() == [2, 2, 2] for table in model.ranks().values())
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    for layer in (m for m in loaded.modules() if isinstance(m, MoreLinear)):
        gate = layer.more_gate["default"]
        gate.bias.data = gate.bias.data.bfloat16().float()
        assert gate.bias.argmax() == 0
    assert torch.equal(logits(loaded), expected)
    loaded.merge_adapter(task=2)
    torch.testing.assert_close(
        logits(loaded, task_ids=torch.tensor([2] * 4)), logits(model, task_ids=torch.tensor([2] * 4))
    )
    torch.testing.assert_close(logits(loaded, task_ids=None), logits(model, task_ids=torch.tensor([2] * 4)))


@pytest.mark.parametrize(("kind", "gate"), [("llama", "ste"), ("llama", "soft"), ("gpt2", "ste"), ("t5", "ste")])
def test_merged_equals_unmerged(kind: str, gate: str) -> None:
    model = adapted(kind, gate=gate)
    before = weights(model)
    for task in range(3):
        tasks = torch.tensor([task] * 4)
        unmerged = logits(model, kind, task_ids=tasks)
        model.merge_adapter(task=task)
        close = {"rtol": 0, "atol": 1e-5 * float(unmerged.abs().max())}
        torch.testing.assert_close(logits(model, kind, task_ids=tasks), unmerged, **close)
        with pytest.raises(ValueError, match="merged"):
            logits(model, kind)
        with pytest.raises(ValueError, match="merged already"):
            model.merge_adapter(task=0)
        model.unmerge_adapter()
        assert same(weights(model), before)
        assert torch.equal(logits(model, kind, task_ids=tasks), unmerged)
    plain = model.merge_and_unload(task=task)
    assert not any(isinstance(m, MoreLinear) for m in plain.modules())
    torch.testing.assert_close(base_logits(plain, kind), unmerged, **close)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_what_is_not_finite(method: str) -> None:
    model = adapted("llama")
    before = weights(model)
    last = [m for m in model.modules() if isinstance(m, MoreLinear)][-1]
    last.more_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        getattr(model, method)(safe_merge=True, task=1)
    model.merge_adapter(safe_merge=False, task=1)
    model.unmerge_adapter()
    last.more_A["default"].weight.data.copy_(
        before[next(n for n in before if n.endswith(f"{last.key}.more_A.default.weight"))]
    )
    assert same(weights(model), before)
    model.merge_adapter(task=0)


def test_merging_needs_a_task_that_is_known() -> None:
    model = adapted("llama")
    for task in (None, 3, -1):
        with pytest.raises(ValueError, match="tasks"):
            model.merge_adapter(task=task)
    model.set_task(1)
    expected = logits(model, task_ids=None)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, task_ids=None), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pooled"):
        adapted("llama", gate_input="pooled").merge_adapter(task=0)


@pytest.mark.parametrize("undo", ["unmerge", "disable", "switch"])
def test_every_way_out_of_a_merge(undo: str) -> None:
    model = adapted("llama")
    expected = logits(model)
    model.merge_adapter(task=1)
    if undo == "unmerge":
        model.unmerge_adapter()
    elif undo == "disable":
        with model.disable_adapter():
            assert torch.equal(base_logits(model, "llama"), base_logits(tiny("llama"), "llama"))
    else:
        with pytest.warns(UserWarning, match="Unmerging"):
            model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_several_adapters() -> None:
    model = adapted("llama")
    first = logits(model)
    model.add_adapter("other", MoreConfig(r=2, num_tasks=5, task_type="CAUSAL_LM", init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    other = logits(model, task_ids=torch.tensor([4, 4, 0, 1]))
    assert (other - first).abs().max() > 1e-4
    assert all(".other" in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.ranks("other").keys() == model.ranks().keys()
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(logits(model), first)
    loss = model.train()(**prompts()).loss
    torch.testing.assert_close(loss, model.losses["lm"] + model.losses["contrastive"])
    model.eval().set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not any("other" in name for name in model.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_pickle(merged: bool) -> None:
    """Also after a training step, whose loss belongs to a graph that cannot be copied."""
    model, tasks = adapted("llama"), torch.tensor([2] * 4)
    if merged:
        model.merge_adapter(task=2)
    expected = logits(model, task_ids=tasks)
    model.train()(**{**prompts(), "task_ids": tasks})
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin, task_ids=tasks), expected)
        contexts = {id(m.context) for m in twin.modules() if isinstance(m, MoreLinear)}
        assert contexts == {id(twin.base_model.context)}
        assert contexts != {id(model.base_model.context)}


TARGETS = [
    ("all-linear", 14),
    (["q_proj", "v_proj"], 4),
    (r".*layers\.1\.mlp\.(up|down)_proj", 2),
    (["layers.0.self_attn.k_proj"], 1),
]


@pytest.mark.parametrize(("target_modules", "count"), TARGETS)
def test_targets(target_modules: object, count: int) -> None:
    assert len(adapted("llama", target_modules=target_modules).ranks()) == count


def test_targets_that_are_not_linear_or_absent() -> None:
    for target_modules, match in ((["embed_tokens"], "Embedding"), (["query"], "not found")):
        with pytest.raises(ValueError, match=match):
            adapted("llama", target_modules=target_modules)
    with pytest.raises(ValueError, match="no encoder"):
        adapted("llama", contrastive_maps="encoder")


BAD_TASKS = [(None, "set_task"), ([3, 0, 0, 0], "0 to 2"), ([-1, 0, 0, 0], "0 to 2"), ([0, 1], "one task per example")]


@pytest.mark.parametrize(("tasks", "match"), BAD_TASKS)
def test_bad_tasks(tasks: list[int] | None, match: str) -> None:
    model = adapted("llama")
    with pytest.raises(ValueError, match=match):
        logits(model, task_ids=None if tasks is None else torch.tensor(tasks))
    with pytest.raises(ValueError, match="0 to 2"):
        model.set_task(3)
    model.set_task(2)
    assert torch.equal(logits(model, task_ids=None), logits(model, task_ids=torch.tensor([2] * 4)))


def test_adapter_for_another_number_of_tasks(tmp_path: Path) -> None:
    adapted("llama").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)
    config = MoreConfig.from_pretrained(tmp_path)
    assert (config.num_tasks, config.gate, config.scale) == (3, "ste", "rank")
    config.num_tasks = 4
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config)


def test_without_a_task_type() -> None:
    """`PeftModel` itself calls the model inside the tuner, which would never learn of the tasks."""
    model, typed = adapted("llama", task_type=None), adapted("llama")
    assert type(model) is PeftModel
    assert torch.equal(logits(model), logits(typed))
    assert model.train()(**prompts()).loss == typed.train()(**prompts()).loss
    ids = {"input_ids": prompts()["input_ids"][:, :4], "task_ids": prompts()["task_ids"]}
    assert torch.equal(*(m.eval().generate(**ids, max_new_tokens=3, do_sample=False) for m in (model, typed)))


def test_from_pretrained_in_a_fresh_process(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path / "adapter")
    tiny("llama").save_pretrained(tmp_path / "base")
    program = (
        "import sys, torch, more_ds; from peft import PeftModel; from transformers import AutoModelForCausalLM as Auto;"
        "model = PeftModel.from_pretrained(Auto.from_pretrained(sys.argv[1] + '/base'), sys.argv[1] + '/adapter');"
        "ids = torch.arange(3, 8).view(1, 5);"
        "torch.set_grad_enabled(False);"
        "print(repr(model(input_ids=ids, task_ids=torch.tensor([1])).logits.double().sum().item()));"
        "assert not torch.distributed.is_initialized() and 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    expected = logits(
        model, input_ids=torch.arange(3, 8).view(1, 5), attention_mask=None, labels=None, task_ids=torch.tensor([1])
    )
    assert float(done.stdout.split()[-1]) == expected.double().sum().item()
