"""MoRE against its equations written out literally, in float64: values and all gradients."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from oracle import Batch, Oracle, adapted, oracle_of, prompts, scramble, tiny
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds import MoreConfig
from more_ds.losses import IGNORED, contrastive_loss, label_nll
from more_ds.tuners.more import MoreLinear, expert_table
from more_ds.tuners.more.config import CHOICES

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
TASKS = [2, 0, 2, 1]
MASKS = [[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]]


def one_map(**switches: object) -> tuple[nn.Module, MoreLinear]:
    settings = {"r": 4, "lora_alpha": 6, "num_tasks": 3, "target_modules": ["map"], "temperature": 0.5}
    base = nn.Sequential()
    base.add_module("map", nn.Linear(6, 5))
    model = get_peft_model(base.double(), MoreConfig(**{**settings, **switches})).train()
    scramble(model)
    return model, model.base_model.model.map


def layer_gradients(layer: MoreLinear) -> dict[str, Tensor]:
    parameters = {name.replace(".default", ""): p for name, p in layer.named_parameters() if "more_" in name}
    names = {"more_A.weight": "more_A", "more_B.weight": "more_B", "more_task.weight": "more_task"}
    return {names.get(k, k): torch.zeros_like(p) if p.grad is None else p.grad for k, p in parameters.items()}


def assert_same_gradients(layer: MoreLinear, oracle: Oracle) -> None:
    ours, literal = layer_gradients(layer), oracle.gradients()
    assert ours.keys() == literal.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], literal[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


GATES = [gate for gate in CHOICES["gate"] if gate != "table"]  # which has no gate to compare
SWITCHES = [GATES, *(CHOICES[name] for name in ("scale", "experts", "gate_input"))]


@pytest.mark.parametrize(("gate", "scale", "experts", "gate_input"), itertools.product(*SWITCHES))
def test_map_equals_the_equations(gate: str, scale: str, experts: str, gate_input: str) -> None:
    for pooling, weight, width in itertools.product(CHOICES["pooling"], (0.0, 0.3), (None, 4)):
        switches = {"gate": gate, "scale": scale, "experts": experts, "gate_input": gate_input, "pooling": pooling}
        model, layer = one_map(**switches, contrastive_weight=weight, task_dim=width)
        oracle = Oracle(layer)
        x, probe = torch.randn(4, 3, 6).double(), torch.randn(4, 3, 5).double()
        inputs = [x.clone().requires_grad_() for _ in range(2)]

        y = model(inputs[0], task_ids=torch.tensor(TASKS), prompt_mask=torch.tensor(MASKS))
        expected = layer.base_layer(inputs[1]) + oracle.update(inputs[1], TASKS, MASKS)
        torch.testing.assert_close(y, expected, **CLOSE)

        loss, literal = (y * probe).sum(), (expected * probe).sum()
        if weight:
            term = weight * oracle.contrastive(inputs[1], TASKS, MASKS)
            torch.testing.assert_close(model.auxiliary_loss, term, **CLOSE)
            loss, literal = loss + model.auxiliary_loss, literal + term
        else:
            assert model.auxiliary_loss is None
        loss.backward()
        literal.backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **CLOSE)
        assert_same_gradients(layer, oracle)


@pytest.mark.parametrize("gate", GATES)
def test_evaluation_equals_the_equations(gate: str) -> None:
    model, layer = one_map(gate=gate)
    model.eval()
    x = torch.randn(4, 3, 6).double()
    expected = layer.base_layer(x) + Oracle(layer).update(x, TASKS, MASKS)
    torch.testing.assert_close(model(x, task_ids=torch.tensor(TASKS)), expected, **CLOSE)
    assert model.auxiliary_loss is None


@pytest.mark.parametrize("shape", [(4, 6), (12, 6), (4, 2, 3, 6)])
def test_other_shapes_take_the_row_of_their_example(shape: tuple[int, ...]) -> None:
    _, layer = one_map(contrastive_weight=0.0)
    x = torch.randn(shape).double()
    expected = layer.base_layer(x) + Oracle(layer).update(x.view(4, -1, 6), TASKS, MASKS).view(*shape[:-1], 5)
    layer.context.begin(torch.tensor(TASKS), None, None)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


MODELS = [
    ("llama", {}),
    ("llama", {"task_dim": 5, "pooling": "last", "scale": "component"}),
    ("llama", {"gate": "soft", "gate_input": "pooled", "experts": "subset"}),
    ("gpt2", {"pooling": "first"}),
    ("gpt2", {"gate": "frozen", "contrastive_weight": 0.0}),
    ("t5", {}),
    ("t5", {"contrastive_maps": "encoder", "scale": "none"}),
    ("t5", {"gate_input": "pooled", "pooling": "mean"}),
]


@pytest.mark.parametrize("backend", ["reference", "eager", "fused"])
@pytest.mark.parametrize(("kind", "switches"), MODELS)
def test_model_equals_the_equations(kind: str, switches: dict[str, object], backend: str) -> None:
    base = tiny(kind).double()
    literal_model = copy.deepcopy(base)
    model = adapted(kind, base, temperature=0.5, backend=backend, **switches).train()
    batch = prompts(kind)
    embedded = base.get_input_embeddings()(batch.pop("input_ids")).detach()
    embeddings = [embedded.clone().requires_grad_() for _ in range(2)]
    prompt = batch["attention_mask"] * (1 if kind == "t5" else (batch["labels"] == IGNORED))
    told = Batch(batch["task_ids"].tolist(), prompt.tolist(), (batch["labels"] != IGNORED).long().tolist())
    maps = oracle_of(model, literal_model, told)
    assert len(maps) == {"llama": 14, "gpt2": 8, "t5": 2 * (4 + 3) + 2 * (8 + 3)}[kind]

    ours = model(inputs_embeds=embeddings[0], **batch)
    del batch["task_ids"]
    literal = literal_model(inputs_embeds=embeddings[1], **batch)
    terms = [m.term for m in maps.values() if m.term is not None]
    weight = switches.get("contrastive_weight", 0.1)
    loss = literal.loss + weight * sum(terms) / len(terms)
    torch.testing.assert_close(ours.logits, literal.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, loss, **CLOSE, check_dtype=False)
    if weight:
        torch.testing.assert_close(model.losses["lm"], literal.loss, **CLOSE)
        torch.testing.assert_close(model.losses["contrastive"], loss - literal.loss, **CLOSE)

    ours.loss.backward()
    loss.backward()
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, rtol=1e-8, atol=1e-11)
    for name, layer in ((n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, MoreLinear)):
        assert_same_gradients(layer, maps[name].oracle)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_side_does_not_matter(pooling: str) -> None:
    model = adapted("llama", gate_input="pooled", gate="soft", pooling=pooling)
    ids, tasks = prompts()["input_ids"][0], torch.tensor([1])
    alone = model(input_ids=ids.view(1, -1), task_ids=tasks).logits
    for left in (True, False):
        sides = (3, 0) if left else (0, 3)
        padded, mask = F.pad(ids, sides).view(1, -1), F.pad(torch.ones_like(ids), sides).view(1, -1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=padded, attention_mask=mask, position_ids=positions, task_ids=tasks).logits
        torch.testing.assert_close(logits[mask == 1].unsqueeze(0), alone)


def test_labels_on_every_token_pool_the_whole_example() -> None:
    model = adapted("llama").train()
    batch = prompts()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    loss = model(**{**batch, "labels": labels}).loss
    contrastive = model.losses["contrastive"]
    model(**{**batch, "labels": None})
    torch.testing.assert_close(contrastive, model.auxiliary_loss)
    torch.testing.assert_close(loss, model.losses["contrastive"] + model.eval()(**{**batch, "labels": labels}).loss)


def test_contrastive_loss_by_hand() -> None:
    """cos(z1, .) = (0.6, 0.8) and cos(z2, .) = (0, 1); at tau = 0.5 the logits are (1.2, 1.6) and (0, 2)."""
    z, embeddings = torch.tensor([[3.0, 4.0], [0.0, 0.5]]), torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    # -log softmax of (1.2, 1.6) at task 0: log(1 + e^0.4) = 0.913015; of (0, 2) at task 1: log(1 + e^-2) = 0.126928.
    loss = contrastive_loss(z, embeddings, torch.tensor([0, 1]), 0.5)
    assert loss.item() == pytest.approx((0.913015 + 0.126928) / 2, abs=1e-6)
    assert contrastive_loss(z, embeddings, torch.tensor([1, 0]), 0.5).item() == pytest.approx(
        (math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(2.0))) / 2, abs=1e-6
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(contrastive_loss(z.bfloat16(), embeddings, torch.tensor([0, 1]), 0.5), loss)


def test_label_nll_by_hand() -> None:
    """Two words with logits (0, log 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([0.0, math.log(3.0)]).expand(2, 3, 2)
    nll, count = label_nll(logits.bfloat16().float(), torch.tensor([[0, 1, IGNORED], [IGNORED, IGNORED, 1]]))
    assert nll.tolist() == pytest.approx([math.log(4.0) + math.log(4 / 3), math.log(4 / 3)], abs=2e-3)
    assert count.tolist() == [2, 1]


def test_expert_table_by_hand() -> None:
    prefix = expert_table(3, 6, "rank", "prefix", 0)
    assert prefix.tolist() == [[1 / 6, 0, 0], [2 / 6, 2 / 6, 0], [3 / 6, 3 / 6, 3 / 6]]
    assert expert_table(2, 6, "component", "prefix", 0).tolist() == [[0.25, 0], [0.25, 1]]
    subset = expert_table(8, 3, "none", "subset", 1)
    assert subset.sum(1).tolist() == list(range(1, 9))
    assert any(bool((subset[k] < subset[k - 1]).any()) for k in range(1, 8))
    assert torch.equal(subset, expert_table(8, 3, "none", "subset", 1))
    assert not torch.equal(subset, expert_table(8, 3, "none", "subset", 2))


BAD = [
    ("gate", "hard"), ("gate", "table"), ("scale", "linear"), ("r", 0), ("num_tasks", 0), ("temperature", 0.0),
    ("task_names", ["a"]), ("init_rank", "8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        MoreConfig(**{"num_tasks": 3, name: value})
