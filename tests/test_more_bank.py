"""All maps together: the functions against their definitions, the back-ends against each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from oracle import VOCABULARY, adapted, prompts, scramble, tiny
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from launch import train
from more_ds import MoreConfig
from more_ds.losses import contrastive_loss
from more_ds.speed.counting import Kernels, kernels
from more_ds.tuners.more import MoreLinear, expert_table, groups
from more_ds.tuners.more.functions import Choose, Contrast, GatedProduct, SharedInput, answer_few
from more_ds.tuners.more.groups import grouped
from more_ds.tuners.more.products import TORCH, triton_products

BACKENDS = ("reference", "eager", "fused")


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def gradients(output: Tensor, probe: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output * probe).sum(), leaves)


@pytest.mark.parametrize("rows", [[1, 1, 0], [2, 0], [0, 1, 2, 2, 1]])
@pytest.mark.parametrize("makes_again", [True, False])
@pytest.mark.parametrize("is_for_all", [True, False])
def test_choice_is_the_straight_through_gate(rows: list[int], makes_again: bool, is_for_all: bool) -> None:
    """With fewer examples than tasks, as many, and more: three ways through the function."""
    weight, bias, embeddings, told = leaf(4, 3, 6), leaf(4, 3), leaf(4, 3, 6), torch.tensor(rows)
    table = expert_table(3, 2, "rank", "prefix", 0)
    p = torch.softmax(embeddings @ weight.mT + bias.unsqueeze(1), -1)
    k = p.argmax(-1, keepdim=True)
    s = 1 + p.gather(-1, k) - p.gather(-1, k).detach()
    chosen = table[k.squeeze(-1)]
    values = chosen + (p - p.detach()) @ table if is_for_all else s * chosen
    expected = values[:, told].transpose(0, 1).reshape(len(rows), -1)
    again = (lambda: (weight.detach(), bias.detach(), embeddings.detach())) if makes_again else None
    found = Choose.apply(weight, bias, embeddings, told, table, is_for_all, again)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=1e-15)
    probe = torch.randn_like(found)
    for ours, theirs in zip(
        gradients(found, probe, weight, bias, embeddings), gradients(expected, probe, weight, bias, embeddings),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert theirs.abs().max() > 0


def test_contrast_is_the_mean_over_the_maps() -> None:
    z, embeddings, rows = leaf(2, 4, 5), leaf(3, 6, 5), torch.tensor([5, 0, 2, 2])
    owners = torch.tensor([1, 0, 1])
    found = Contrast.apply(z, owners, embeddings, rows, 0.3)
    expected = contrastive_loss(z[owners], embeddings, rows, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    ours, theirs = (torch.autograd.grad(loss, (z, embeddings)) for loss in (found, expected))
    for i in range(2):
        torch.testing.assert_close(ours[i], theirs[i], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("own_rows", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("is_product", [True, False])
def test_maps_of_one_input(own_rows: bool, dropout: float, pools: bool, is_product: bool) -> None:
    gate, up = leaf(2, 3, 4), leaf(2, 3, 4)
    a, v, bs = leaf(4, 4), leaf(2 if own_rows else 1, 4), [leaf(5, 2), leaf(3, 2)]
    bases = [torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.randn(5).double(), None]
    pooling = torch.rand(2, 2, 3).double() if pools else None  # two examples in a row

    def run(gate: Tensor, up: Tensor, a: Tensor, v: Tensor, *bs: Tensor) -> Any:
        torch.manual_seed(5)  # of the dropout
        product = GatedProduct(F.silu, gate, up) if is_product else None
        x = gate if product is None else product.value
        return SharedInput.apply(x, TORCH, product, dropout, a, v, pooling, 2, *bases, *bs)

    outputs = run(gate, up, a, v, *bs)
    torch.manual_seed(5)
    x = F.silu(gate) * up if is_product else gate
    scaled = (F.dropout(x, dropout) @ a.T) * v.unsqueeze(1)
    torch.testing.assert_close(outputs[0], x @ bases[0].T + bases[2] + scaled[..., :2] @ bs[0].T)
    torch.testing.assert_close(outputs[1], x @ bases[1].T + scaled[..., 2:] @ bs[1].T)
    if pools:
        torch.testing.assert_close(outputs[2], torch.einsum("bes,bsd->bed", pooling, x).flatten(0, 1))
    assert torch.autograd.gradcheck(run, (gate, up, a, v, *bs))
    # A map that nobody reads leaves the others' gradients alone.
    alone = torch.autograd.grad(run(gate, up, a, v, *bs)[1].sum(), (a, bs[1]), allow_unused=True)
    torch.testing.assert_close(alone[0][:2], torch.zeros(2, 4).double())
    assert alone[1].abs().max() > 0


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4), (3, 2, 4)])
@pytest.mark.parametrize("own_rows", [True, False])
def test_maps_of_few_tokens(shape: tuple[int, ...], own_rows: bool) -> None:
    x, a, v = torch.randn(shape).double(), leaf(4, 4), leaf(3 if own_rows else 1, 4)
    ws, bs, biases = [leaf(5, 4), leaf(3, 4)], [leaf(5, 2), leaf(3, 2)], [leaf(5), None]
    bases = [{"weight": w, "bias": bias} for w, bias in zip(ws, biases, strict=True)]
    with torch.no_grad():
        found = list(answer_few(x, a, v, bases, bs))
        for i, (w, bias, b) in enumerate(zip(ws, biases, bs, strict=True)):
            rows = v[:, 2 * i : 2 * i + 2].view(-1, *[1] * (len(shape) - 2), 2)
            expected = x @ w.T + (0 if bias is None else bias) + ((x @ a[2 * i : 2 * i + 2].T) * rows) @ b.T
            torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_few_tokens_are_computed_as_many_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(kind, tiny(kind), backend="fused").eval()
    scramble(model)
    found, inputs = [], prompts(kind)
    with torch.no_grad(), mock.patch.object(groups, "answer_few", wraps=answer_few) as chosen:
        for few in (0, 10**6):
            monkeypatch.setattr(groups, "FEW", few)
            found.append((model(**inputs).logits, chosen.call_count))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[1][1] > found[0][1] == 0


def trained(kind: str, backend: str, base: nn.Module, **switches: Any) -> tuple[Any, dict[str, Tensor]]:
    model = adapted(kind, copy.deepcopy(base), backend=backend, temperature=0.5, **switches).train()
    torch.manual_seed(3)  # of the dropout
    outputs = model(**prompts(kind))
    outputs.loss.backward()
    return outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, {"rtol": 1e-9, "atol": 1e-12}), (torch.bfloat16, {"rtol": 0.1, "atol": 0.1})]
)
def test_back_ends_agree(kind: str, dtype: torch.dtype, close: dict[str, float]) -> None:
    """Dropout too: maps that read one tensor share a mask in all of them."""
    base = tiny(kind).to(dtype)
    outputs, wanted = trained(kind, "reference", base, lora_dropout=0.2)
    for backend in BACKENDS[1:]:
        found, grads = trained(kind, backend, base, lora_dropout=0.2)
        torch.testing.assert_close(found.logits, outputs.logits, **close)
        torch.testing.assert_close(found.loss, outputs.loss, **close)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], **close, msg=lambda m, n=name: f"{n}: {m}")


class Attention(nn.Module):
    """Keys that read something else than their name promises."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        return q * self.k_proj(torch.tanh(x)) + self.v_proj(x)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_names_that_promise_too_much(backend: str) -> None:
    results = []
    for own in ("reference", backend):
        torch.manual_seed(0)
        base = nn.Sequential(Attention(), Attention()).double()
        config = MoreConfig(r=4, num_tasks=3, target_modules=["q_proj", "k_proj", "v_proj"], backend=own)
        model = get_peft_model(base, config).train()
        scramble(model)
        x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
        y = model(x, task_ids=torch.tensor([2, 1]))
        (y.square().sum() + model.auxiliary_loss).backward()
        results.append((y, model.auxiliary_loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_maps_without_the_active_adapter_are_the_base(backend: str) -> None:
    """Two adapters on different maps: the bank of the one knows nothing of the other's."""
    losses = []
    for own in ("reference", backend):
        model = adapted("llama")
        config = MoreConfig(r=4, num_tasks=3, target_modules=["q_proj"], task_type="CAUSAL_LM", backend=own)
        model.add_adapter("narrow", config)
        scramble(model)
        model.set_adapter("narrow")
        losses.append(model.train()(**prompts()).loss)
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", [3, 1, 2, 1] * 2), ("gpt2", [1] * 8), ("t5", [3, 1, 2, 1] * 2 + [3, 1, 1, 2, 1, 2, 1] * 2)],
)
def test_groups(kind: str, sizes: list[int]) -> None:
    layers = [m for m in adapted(kind).modules() if isinstance(m, MoreLinear)]
    assert [len(group) for group in grouped(layers)] == sizes


def counted(run: Callable[[], object]) -> Kernels:
    run()  # what a first step alone does is not counted
    return kernels(run)


def test_more_adds_a_constant_number_of_kernels_and_no_question() -> None:
    def step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model(**batch).loss.backward()

        return run

    added = []
    for layers in (2, 6):
        base = tiny("llama", layers)
        batch = prompts()
        with_more = counted(step(adapted("llama", copy.deepcopy(base)).train(), batch))
        plain = adapted("llama", copy.deepcopy(base), trained=False, gate="table", contrastive_weight=0.0).train()
        without = counted(step(plain, batch))
        assert with_more.asked == without.asked
        added.append(with_more.sent - without.sent)
    assert added[0] <= 150
    # Four tensors a block are pooled, forward and back.
    assert added[1] - added[0] <= 4 * 2 * 4, "what MoRE adds grows faster with the depth"


def test_a_kernel_that_cannot_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """In float64, and without a GPU: torch's products, one line, the same loss."""
    triton_products.cache_clear()
    models = [adapted("llama", backend=backend).double().train() for backend in ("fused", "triton", "triton")]
    losses = [model(**prompts()).loss for model in models]
    assert losses[0] == losses[1] == losses[2]
    assert capsys.readouterr().out.count("backend triton: ") == 1


@pytest.mark.parametrize("gate", ["ste", "soft"])
def test_trains_after_inference_mode(gate: str) -> None:
    """What is made once and kept may be made in a pass that autograd never sees."""
    model = adapted("llama", gate=gate, task_dim=3).train()
    with torch.inference_mode():
        before = model(**prompts()).loss
    after = model(**prompts()).loss
    after.backward()
    torch.testing.assert_close(after, before)


def saved(model: Any, width: int) -> list[torch.Size]:
    """Shapes of the different tensors with rows of `width` values that a forward pass keeps for the backward pass."""
    found: dict[int, Tensor] = {}  # alive, so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.shape[-1] == width:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**prompts())
    return [tensor.shape for tensor in found.values()]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_gated_network_keeps_its_two_factors(dropout: float) -> None:
    base = tiny("llama", 3)
    inner, tokens = base.config.intermediate_size, prompts()["input_ids"].numel()
    assert inner not in (base.config.hidden_size, VOCABULARY)
    kept = {}
    for backend in ("eager", "fused"):
        model = adapted("llama", copy.deepcopy(base), backend=backend, lora_dropout=dropout).train()
        kept[backend] = sum(shape[:-1].numel() == tokens for shape in saved(model, inner))
    assert kept["fused"] == 3 * (2 if dropout == 0 else 3)  # and which values dropout has left
    assert kept["eager"] >= 3 * 4


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model = adapted("llama").train()
    batch = prompts()
    expected = model(**batch).loss
    explained = torch._dynamo.explain(lambda: model(**batch).loss)()
    assert explained.graph_break_count == 0, [str(reason) for reason in explained.break_reasons]
    compiled = torch.compile(lambda: model(**batch).loss, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)


@pytest.mark.slow
def test_back_ends_have_one_learning_curve(models_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """200 steps of the real checkpoint on real tasks, in fp32: within 1e-5 at every step."""
    curves = []
    for backend in BACKENDS:
        argv = ["--recipe", "demo", "--suite", "glue", "--model", str(models_dir / "stories260K"), "--data_dir"]
        argv += [str(data_dir), "--train_limit", "400", "--max_steps", "200", "--train_batch_size", "8", "--test"]
        argv += [
            "false",
            "--eval_on_start",
            "false",
            "--eval_steps",
            "200",
            "--eval_limit",
            "4",
            "--logging_steps",
            "1",
        ]
        argv += ["--adapter.backend", backend, "--output_dir", str(tmp_path / backend), "--learning_rate", "1e-3"]
        assert run_ranks(lambda _, argv=argv: train.main(argv), 1) == [0]
        rows = map(json.loads, (tmp_path / backend / "metrics.jsonl").read_text().splitlines())
        curves.append(torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64))
    assert len(curves[0]) == 200
    assert curves[0][-50:].mean() < 0.8 * curves[0][:20].mean(), "it learns nothing"
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=0, atol=1e-5)


def test_the_back_end_is_not_saved() -> None:
    assert "backend" not in MoreConfig(backend="eager").to_dict()
    with pytest.raises(ValueError, match="backend"):
        MoreConfig(backend="fast")
