"""Whether the tasks pull the adapter apart: the norms of their gradients, and the cosines between them.

Measured beside the training, which stays what it is, to the bit: the gradients never reach the parameters, and random
numbers and buffers are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.data.collate import Batch
from more_ds.engine import Ranks
from more_ds.losses import label_nll
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

COLUMNS = 1 << 20
"""Values of a gradient that are multiplied at once, in float64."""


def task_gradients(
    text_model: TextModel,
    examples: Sequence[Sequence[Example]],
    task_names: Sequence[str],
    *,
    micro: int,
    ranks: Ranks,
    seed: int,
) -> dict[str, Any]:
    """Measure the gradient of every task's language modelling loss with respect to what is trained.

    The loss is the mean over the label tokens of a micro-batch for each rank: the first rows of the task, the same
    at every call. The method's own loss is left out.

    Args:
        text_model: whose parameters are whole on each rank (ZeRO-0 to 2).
        examples: training examples by task.
        task_names: of them.
        micro: examples of a micro-batch.
        ranks: all of which must call this.
        seed: of dropout.

    Returns:
        `norm` by task, and `cosine` by task and later task; None where a gradient is zero.
    """
    model = text_model.peft
    plain = copy.copy(text_model)
    plain.module = model  # not the engine, which counts the passes
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    with _left_alone(model, ranks, seed):
        for task, rows in enumerate(examples):
            batch = plain.to_device(_batch(plain, rows, task, micro, ranks.rank))
            nll, tokens = label_nll(plain.label_logits(batch), batch["labels"])
            parts = torch.autograd.grad(nll.sum(), trained, allow_unused=True)
            flat = [torch.zeros_like(p) if part is None else part for p, part in zip(trained, parts, strict=True)]
            whole = ranks.sum(torch.cat([part.flatten().float() for part in flat]))
            found.append((whole / ranks.sum(tokens.sum())).cpu())
    return _angles(_products(found), task_names)


def _batch(text_model: TextModel, rows: Sequence[Example], task: int, micro: int, rank: int) -> Batch:
    chosen = [rows[(rank * micro + i) % len(rows)] for i in range(micro)]
    encoder = text_model.encoder
    prompts, targets = encoder.prompts([row.prompt for row in chosen]), encoder.targets([row.target for row in chosen])
    return text_model.collator.answers(prompts, targets, [task] * micro)


@contextmanager
def _left_alone(model: nn.Module, ranks: Ranks, seed: int) -> Iterator[None]:
    """Training mode, as a gate is trained through it; random state, buffers and the mode come back."""
    training = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[ranks.device] if ranks.on_gpu else []), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.train(training)
            for buffer, before in buffers:
                buffer.copy_(before)


def _products(gradients: Sequence[Tensor]) -> Tensor:
    """Scalar products of all pairs, (tasks, tasks) float64."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*(gradient.split(COLUMNS) for gradient in gradients), strict=True):
        block = torch.stack(parts).double()
        total += block @ block.T
    return total


def _angles(products: Tensor, task_names: Sequence[str]) -> dict[str, Any]:
    norms = products.diagonal().sqrt()
    lengths = torch.outer(norms, norms)
    cosines = (products / lengths).masked_fill(lengths == 0, torch.nan).tolist()
    return {
        "norm": dict(zip(task_names, norms.tolist(), strict=True)),
        "cosine": {
            one: {
                other: None if cosines[i][j] != cosines[i][j] else cosines[i][j]
                for j, other in enumerate(task_names)
                if j > i
            }
            for i, one in enumerate(task_names[:-1])
        },
    }
