"""A task added to a trained MoRE: the others do not move by a bit, it learns, and it is saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY, base_model
from torch import Tensor

from more_ds import MoreConfig
from more_ds.tuners.more import MoreLinear

NAMES = ["one", "two", "three"]


def make(kind: str = "llama", **switches: Any) -> Any:
    config = MoreConfig(
        r=4, num_tasks=3, task_names=NAMES, init_weights=False, lora_dropout=0.1,
        task_type="SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM", **switches,
    )  # fmt: skip
    return get_peft_model(base_model(kind), config)


def batch(tasks: list[int]) -> dict[str, Tensor]:
    ids = torch.randint(4, VOCABULARY, (len(tasks), 9), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "task_ids": torch.tensor(tasks)}


@torch.no_grad()
def logits(model: Any, tasks: list[int]) -> Tensor:
    return model.eval()(**batch(tasks)).logits


def train(model: Any, task: int, steps: int = 12) -> dict[str, list[float]]:
    """Plain AdamW with weight decay, which moves whatever has a gradient, zero or not; returns the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    model.train()
    losses: dict[str, list[float]] = {"whole": [], "contrastive": []}
    for _ in range(steps):
        torch.manual_seed(0)  # the same dropout, so that the loss falls by learning alone
        loss = model(**batch([task] * 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses["whole"].append(loss.item())
        losses["contrastive"].append(model.base_model.losses["contrastive"].item())
    return losses


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        ("llama", {}),
        ("llama", {"gate": "soft"}),
        ("llama", {"gate": "soft", "task_dim": 5, "scale": "component"}),
        ("llama", {"experts": "subset", "scale": "none"}),
        ("t5", {}),
        ("t5", {"gate": "soft", "contrastive_maps": "encoder"}),
    ],
)
def test_the_other_tasks_do_not_move_by_a_bit(kind: str, switches: dict[str, Any]) -> None:
    model = make(kind, **switches)
    train(model, 1, steps=3)
    before = logits(model, [0, 1, 2])
    number = model.add_task("four", "two")
    assert number == 3
    assert torch.equal(logits(model, [0, 1, 2]), before)
    # In the place of its source the task gives the same answer.
    torch.testing.assert_close(logits(model, [0, 3, 2]), before, rtol=1e-5, atol=1e-5)
    model.train_task("four")
    frozen = state(model)
    losses = train(model, number)
    # A hard gate makes the answer's loss jump with the ranks; what follows the embedding smoothly has to fall.
    falling = losses["whole" if switches.get("gate") == "soft" else "contrastive"]
    assert falling[-1] < falling[0]
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, frozen[name])}
    added = {name for name in frozen if name.endswith("more_task.default.added_0")}
    assert added <= moved
    assert all("added_0" in name or "more_ranks" in name for name in moved)
    assert torch.equal(logits(model, [0, 1, 2]), before)
    for layer in (m for m in model.modules() if isinstance(m, MoreLinear)):
        assert torch.equal(layer.ranks("default")[:3], frozen_ranks(frozen, layer))


def frozen_ranks(frozen: dict[str, Tensor], layer: MoreLinear) -> Tensor:
    return frozen[f"base_model.model.{layer.key}.more_ranks.default"][:3]


def test_a_stored_table_stays_where_the_gate_would_now_say_otherwise() -> None:
    """In another type the gate of a loaded adapter may tie: the old tasks keep the ranks they were trained with."""
    model = make()
    layers = [m for m in model.modules() if isinstance(m, MoreLinear)]
    for layer in layers:
        chosen = layer.ranks("default")
        layer.more_ranks["default"] = chosen % 4 + 1  # none of them is what the gate says
    before = logits(model, [0, 1, 2])
    model.train_task("four" if model.add_task("four", 0) else None)
    train(model, 3, steps=2)
    assert torch.equal(logits(model, [0, 1, 2]), before)


def test_everything_can_be_trained_instead() -> None:
    model = make()
    model.add_task("four", 0)
    model.train_task("four")
    model.train_task(None)
    before = state(model)
    train(model, 3, steps=3)
    moved = {
        name.rpartition(".layers.")[0] or name for name, t in state(model).items() if not torch.equal(t, before[name])
    }
    assert moved
    moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
    for kind in ("more_A", "more_B", "more_gate", "more_task.default.weight", "added_0"):
        assert any(kind in name for name in moved)


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(str(tmp_path / "old"))
    for name, source in (("four", "two"), ("five", "four")):
        model.add_task(name, source)
        model.train_task(name)
        train(model, model.peft_config["default"].num_tasks - 1, steps=4)
    expected = logits(model, [0, 1, 2, 3, 4])
    model.save_pretrained(str(tmp_path / "new"))
    loaded = PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "new"))
    config = loaded.peft_config["default"]
    assert (config.num_tasks, config.first_tasks, config.task_names) == (5, 3, [*NAMES, "four", "five"])
    assert torch.equal(logits(loaded, [0, 1, 2, 3, 4]), expected)
    for task in (1, 3, 4):
        merged = PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "new")).merge_and_unload(task=task)
        inputs = batch([0])["input_ids"]
        routed = loaded.eval()(input_ids=inputs, task_ids=torch.tensor([task])).logits
        torch.testing.assert_close(merged(input_ids=inputs).logits, routed, rtol=1e-4, atol=1e-4)
    old = PeftModel.from_pretrained(base_model("llama"), str(tmp_path / "old"))
    assert old.peft_config["default"].first_tasks is None
    assert torch.equal(logits(old, [0, 1, 2]), logits(loaded, [0, 1, 2]))


@pytest.mark.parametrize(
    ("name", "init_from", "message"),
    [
        ("two", "one", "knows task 'two' already; it knows: one, two, three"),
        ("four", "thre", "init_from is 'thre'; did you mean 'three'"),
        ("four", 3, "init_from is 3; known"),
        ("four", -1, "init_from is -1"),
    ],
)
def test_a_task_that_cannot_be_added(name: str, init_from: Any, message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        model.add_task(name, init_from)
    assert model.peft_config["default"].num_tasks == 3


def test_only_an_added_task_trains_alone() -> None:
    model = make()
    with pytest.raises(ValueError, match="'two' is no task that was added"):
        model.train_task("two")
    frozen = make(gate="frozen")
    frozen.add_task("four", 0)
    with pytest.raises(ValueError, match="a task embedding decides nothing"):
        frozen.train_task("four")
    with pytest.raises(ValueError, match="first_tasks is 4; it must be from 1 to num_tasks=3"):
        MoreConfig(num_tasks=3, first_tasks=4)
