"""MoRE in use: batches, decoding, number formats, checkpointing, quantised bases, a plain loop and the HF Trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from oracle import VOCABULARY, adapted, prompts, scramble, tiny
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from more_ds import MoreConfig
from more_ds.losses import IGNORED
from more_ds.tuners.more import MoreLinear

KINDS = ("llama", "gpt2", "t5")


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if ".more_" in n and p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("gate_input", ["task", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_one_example_at_a_time(kind: str, gate_input: str) -> None:
    model = adapted(kind, tiny(kind).double(), gate_input=gate_input).train()
    batch = prompts(kind)
    del batch["attention_mask"]
    batch["labels"] = batch["labels"].clamp(min=1)
    batch["labels"][:, :1] = IGNORED
    outputs = model(**batch)
    outputs.loss.backward()
    together = adapter_gradients(model)
    model.zero_grad()
    for i in range(4):
        one = model(**{name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(one.logits[0], outputs.logits[i])
        (one.loss / 4).backward()
    assert_close(together, adapter_gradients(model), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gate_input", ["task", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_greedy_decoding_of_the_full_forward(kind: str, gate_input: str) -> None:
    """With the cache, with beams' repeated rows, and by hand without either."""
    model = adapted(kind, gate_input=gate_input)
    ids, tasks = prompts()["input_ids"][:, :4], torch.tensor([2, 0, 1, 0])
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": 2, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, task_ids=tasks, **options)
    steps = torch.zeros(4, 1, dtype=torch.long) if kind == "t5" else ids
    for _ in range(5):
        prompt_mask = (torch.arange(steps.shape[1]) < 4).long().expand_as(steps)
        inputs = {"input_ids": steps, "prompt_mask": prompt_mask}
        if kind == "t5":
            inputs = {"input_ids": ids, "decoder_input_ids": steps}
        with torch.no_grad():
            logits = model(**inputs, task_ids=tasks).logits[:, -1]
        logits[:, 2] = -torch.inf
        steps = torch.cat([steps, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, steps)
    beams = model.generate(input_ids=ids, task_ids=tasks, num_beams=3, **options)
    for i in (0, 3):
        alone = model.generate(input_ids=ids[i : i + 1], task_ids=tasks[i : i + 1], num_beams=3, **options)
        assert torch.equal(alone[0], beams[i])
    other = model.generate(input_ids=ids, task_ids=torch.tensor([1, 2, 0, 2]), **options)
    assert torch.equal(other, cached) == (gate_input == "pooled")


def test_tuple_outputs_and_the_share_of_a_micro_batch() -> None:
    model = adapted("llama").train()
    batch = prompts()
    full = model(**batch)
    lm, contrastive = model.losses["lm"], model.losses["contrastive"]
    torch.testing.assert_close(full.loss, lm + contrastive)
    loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, full.loss)
    assert torch.equal(logits, full.logits)
    tokens = int((batch["labels"] != IGNORED).sum())
    share = model(**batch, num_items_in_batch=torch.tensor(4 * tokens))
    torch.testing.assert_close(share.loss, (lm + contrastive) / 4)


@pytest.mark.parametrize("gate_input", ["task", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, gate_input: str) -> None:
    model = adapted(kind, tiny(kind).double(), gate_input=gate_input).train()
    loss = model(**prompts(kind)).loss
    loss.backward()
    expected = adapter_gradients(model)
    assert any(g.abs().max() > 0 for n, g in expected.items() if "more_gate" in n)
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, MoreLinear))
    layer.register_forward_hook(lambda *_: calls.append(1))
    again = model(**prompts(kind)).loss
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    again.backward()
    assert len(calls) == 2
    assert not model.base_model.context.collect(), "the recomputation's losses are no losses"
    assert_close(adapter_gradients(model), expected, rtol=1e-6, atol=1e-9)


def test_gate_is_float32_in_half_precision() -> None:
    """Two experts which tie in bfloat16: the gate must see the difference, in a bfloat16 model and under autocast."""
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = adapted("llama", tiny("llama").to(dtype)).train()
        for layer in (m for m in model.modules() if isinstance(m, MoreLinear)):
            gate = layer.more_gate["default"]
            assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
            gate.weight.data.zero_()
            gate.bias.data = torch.tensor([1.0, 1.001, 0.0, 0.0])
            assert gate.bias.bfloat16().argmax() == 0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**prompts()).loss
        loss.backward()
        assert torch.isfinite(loss)
        layers = [m for m in model.modules() if isinstance(m, MoreLinear)]
        assert all(layer.ranks("default").tolist() == [2, 2, 2] for layer in layers)
        assert {g.dtype for g in adapter_gradients(model).values()} == {torch.float32}


def test_half_precision_adapter_trains_and_evaluates_with_the_same_ranks() -> None:
    """Rounding the gate to the base's type may flip a rank: before the first step too, both must agree."""
    base = nn.Sequential()
    base.add_module("map", nn.Linear(64, 8))
    config = MoreConfig(r=64, num_tasks=256, target_modules=["map"], init_weights=False)
    model = get_peft_model(base.bfloat16(), config, autocast_adapter_dtype=False)
    before = model.ranks()["map"].clone()
    model.train()(torch.randn(256, 1, 64).bfloat16(), task_ids=torch.arange(256))
    assert torch.equal(before, model.ranks()["map"])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential()
    linear = (
        bnb.nn.Linear4bit(64, 32, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    base.add_module("map", linear)
    x, tasks = torch.randn(3, 5, 64), torch.tensor([1, 1, 1])
    try:
        base.to("cpu")
        base(x)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes cannot run {bits} bit on this CPU: {error}")
    model = get_peft_model(base, MoreConfig(r=4, num_tasks=3, target_modules=["map"], lora_alpha=32)).eval()
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(model(x, task_ids=tasks), plain)
    scramble(model)
    layer = model.base_model.model.map
    model.train()(x, task_ids=tasks).square().mean().backward()
    assert adapter_gradients(model).keys() == {n for n, _ in model.named_parameters() if ".more_" in n}
    model.eval()
    before, raw = model(x, task_ids=tasks), layer.base_layer.weight.data.clone()
    delta = layer.get_delta_weight("default", 1)
    torch.testing.assert_close(before - plain, x @ delta.T, rtol=1e-3, atol=1e-4)

    model.merge_adapter(task=1)
    assert layer.base_layer.weight.dtype == raw.dtype
    merged = model(x, task_ids=tasks)
    assert (merged - before).norm() < 0.2 * (before - plain).norm()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.data, raw)
    assert torch.equal(model(x, task_ids=tasks), before)
    assert torch.equal(model.to("cpu")(x, task_ids=tasks), before)
    assert torch.equal(copy.deepcopy(model)(x, task_ids=tasks), before)


def gate_change(model: PeftModel, before: dict[str, Tensor]) -> float:
    moved = [(p - before[n]).abs().max() for n, p in model.named_parameters() if "more_gate" in n]
    return torch.stack(moved).max().item()


def train(model: PeftModel, steps: int, freeze_b: bool = False) -> tuple[list[float], list[float]]:
    """A plain loop; the losses, and the norms of the gate's gradients."""
    for name, parameter in model.named_parameters():
        if freeze_b and "more_B" in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses, norms = [], []
    model.train()
    for _ in range(steps):
        loss = model(**prompts()).loss
        optimizer.zero_grad()
        loss.backward()
        gates = [g for n, g in adapter_gradients(model).items() if "more_gate" in n]
        norms.append(sum(float(g.norm()) for g in gates))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def test_gate_trains_in_a_plain_loop() -> None:
    model = adapted("llama", trained=False)
    ranks = {name: table.clone() for name, table in model.ranks().items()}
    losses, norms = train(model, 25)
    assert losses[-1] < 0.7 * losses[0]
    assert norms[0] == 0
    assert all(norm > 0 for norm in norms[1:])
    assert any(not torch.equal(table, ranks[name]) for name, table in model.ranks().items())


def test_table_follows_the_last_step() -> None:
    """The optimizer moves the gate after the last forward: a saved table must be that of the moved gate."""
    model = adapted("llama").train()
    model(**prompts())
    for layer in (m for m in model.modules() if isinstance(m, MoreLinear)):
        layer.more_gate["default"].bias.data[2] = 100.0
    saved = {name: table.tolist() for name, table in model.state_dict().items() if "more_ranks" in name}
    assert list(saved.values()) == [[3, 3, 3]] * 14


@pytest.mark.parametrize(("freeze_b", "switches"), [(True, {"contrastive_weight": 0.0}), (False, {"gate": "frozen"})])
def test_gate_does_not_move_without_a_gradient(freeze_b: bool, switches: dict[str, object]) -> None:
    """With B at zero nothing reaches the gate; a frozen gate keeps its table though its embeddings train."""
    model = adapted("llama", trained=False, **switches)
    ranks = {name: table.clone() for name, table in model.ranks().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, norms = train(model, 10, freeze_b)
    assert sum(norms) == 0
    if not freeze_b:
        assert gate_change(model, before) == 0
        assert not any(p.requires_grad for n, p in model.named_parameters() if "more_gate" in n)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "more_task" in n)
    assert all(torch.equal(table, ranks[name]) for name, table in model.ranks().items())


class Rows(torch.utils.data.Dataset):
    """Fixed-length rows, as the Trainer's default collator wants them; the count of labels differs."""

    def __init__(self) -> None:
        self.taken: list[dict[str, object]] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, object]:
        self.taken.append(self.row(i))
        return self.taken[-1]

    def row(self, i: int) -> dict[str, object]:
        ids = torch.randint(3, VOCABULARY, (6,), generator=torch.Generator().manual_seed(i))
        labels = ids.masked_fill(torch.arange(6) < 2 + i % 3, IGNORED)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task_ids": i % 3}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_hugging_face_trainer(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's gradient is the mean over its label tokens, however it is split; the contrastive loss too."""
    model, rows = adapted("llama"), Rows()
    options = {"num_train_epochs": 8, "learning_rate": 0.03, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda *a, **k: (seen.append(adapter_gradients(model)), step(*a, **k))[1])
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    monkeypatch.setattr(trainer, "log", lambda *_, **__: None)
    trainer.train()

    plain, batches = adapted("llama").train(), []
    for k in range(accumulation):
        taken = rows.taken[8 // accumulation * k : 8 // accumulation * (k + 1)]
        batches.append({name: torch.stack([torch.as_tensor(row[name]) for row in taken]) for name in taken[0]})
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    for batch, count in zip(batches, counts, strict=True):
        (plain(**batch).loss * count / sum(counts)).backward()
    assert len(seen) == 8
    assert_close(seen[0], adapter_gradients(plain), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert model.train()(**batches[0]).loss < 0.6 * plain(**batches[0]).loss
    assert gate_change(model, before) > 0
