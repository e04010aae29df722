"""A micro-batch in one row: what is trained is what is trained with padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import scramble
from tiny_models import base_model, text_model
from transformers import masking_utils

from more_ds.data.collate import Collator
from more_ds.errors import UserError
from more_ds.methods import METHODS, adapter_config, check_together
from more_ds.model import attach
from more_ds.padding_free import check_one_row
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

PROMPTS, TARGETS = [[2, 7, 8, 9], [2, 30], [2, 11, 12]], [[20, 1], [21, 22, 1], [23, 1]]
ALIKE = [name for name, method in METHODS.items() if "padding_free" not in method.refuses and name != "full"]


def test_one_row() -> None:
    batch = Collator(0, flat=True).answers(PROMPTS, TARGETS, [1, 1, 1])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 20, 1, 2, 30, 21, 22, 1, 2, 11, 12, 23, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[20, 1, 21, 22, 1, 23, 1]]
    assert batch["label_positions"].tolist() == [3, 4, 7, 8, 9, 13, 14]
    assert batch["prompt_mask"].sum(1).tolist() == [4, 2, 3]
    assert batch["task_ids"].tolist() == [1]


def trained(model: TextModel, flat: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    batch = replace(model.collator, flat=flat).answers(PROMPTS, TARGETS, [1] * 3)
    model.peft.zero_grad()
    torch.manual_seed(0)  # of a method that draws a rank
    loss, total, auxiliary = model.training_loss(batch, torch.tensor(0.25, dtype=torch.float64))
    loss.backward()
    return (loss, total, auxiliary), {n: p.grad for n, p in model.peft.named_parameters() if p.grad is not None}


def compare(model: TextModel) -> None:
    model.peft.double().train()
    for module in model.peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    padded, wanted = trained(model, False)
    flat, found = trained(model, True)
    torch.testing.assert_close(flat, padded, rtol=1e-9, atol=1e-12)
    assert found.keys() == wanted.keys() != set()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("backend", ["reference", "eager", "fused"])
def test_more_trains_as_with_padding(backend: str, pooling: str) -> None:
    compare(text_model("llama", ["a", "b", "c"], backend=backend, pooling=pooling))


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_models_train_as_with_padding(kind: str) -> None:
    compare(text_model(kind, ["a", "b"]))


@pytest.mark.parametrize("method", ALIKE)
def test_methods_train_as_with_padding(method: str) -> None:
    base = base_model("llama")
    model = attach(base, adapter_config(method, {}, ["a", "b"], base.config))
    scramble(model)
    compare(TextModel(model, text_model("llama").encoder))


def test_a_model_that_mixes_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example("t", i, prompt, "no", (), 0) for i, prompt in enumerate(["a long first one", "short"])]
    check_one_row(text_model("llama", ["a", "b"]), examples)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(UserError, match="padding_free: LlamaForCausalLM lets examples of one row see each other"):
        check_one_row(text_model("llama", ["a", "b"]), examples)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "mpt", "mole"])
def test_methods_of_one_example_a_row_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=f"{method} does not go with --padding_free: "):
        check_together(method, padding_free=True)
