"""How a batch runs through a model: what the vocabulary's projection computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, text_model
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_vocabulary_is_projected_for_the_answers_alone_and_its_matrix_is_not_copied(kind: str) -> None:
    model = text_model(kind, ["only"])
    prompts, answers = [[5, 6, 7, 8, 9, 10], [5, 6, 7]], [[11, 12, 1], [13, 1]]
    batch = model.collator.answers(prompts, answers, [0, 0])
    with Sizes() as seen:
        logits = model.label_logits(batch)
        logits.sum().backward()
    length = batch["labels"].shape[1]
    assert logits.shape == (2, length, VOCABULARY)
    rows = [shape for shape in seen.shapes if VOCABULARY in shape]
    assert rows, "the projection was seen"
    assert not [shape for shape in rows if len(shape) == 3 and length + 1 not in shape and length not in shape]
    model.keeps_logits = False
    torch.testing.assert_close(logits, model.label_logits(batch))
