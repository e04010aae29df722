"""LoraHub: one weight for every LoRA, found from a few examples without a gradient.

    A = sum_i w_i A_i,   B = sum_i w_i B_i,   -1.5 <= w_i <= 1.5, all 0 at the start
    minimise over w:  loss on the examples + 0.05 * mean |w_i|

Source: "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (COLM 2024) and its code: A's and
B's are summed apart, so that B A has terms w_i w_j B_i A_j too. The result is a LoRA. Deviations: CMA-ES (package
`cma`) searches in the place of Nevergrad's choice among optimisers, of which it is one; LoRAs of other ranks or maps
are filled up with zeros, where the code refuses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from more_ds.compose.sources import weighted_sum
from more_ds.export.factors import Factors
from more_ds.losses import label_nll
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like matplotlib
    import cma

BOUND = 1.5
PENALTY = 0.05
SPREAD = 0.5
"""Standard deviation of the first weights that are tried."""


def search(loss: Callable[[list[float]], float], count: int, evaluations: int, seed: int) -> list[float]:
    """The weights with the least loss and penalty; the first that are tried are all zero.

    Args:
        loss: of weights, on the examples.
        count: number N of weights, at least 2.
        evaluations: how often the loss is asked for.
        seed: of the search.
    """

    def objective(weights: Sequence[float]) -> float:
        return loss(list(weights)) + PENALTY * sum(abs(w) for w in weights) / count

    best = [0.0] * count
    least, left = objective(best), evaluations - 1
    options = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9}  # to cma, seed 0 is the clock
    strategy: Any = cma.CMAEvolutionStrategy(best, SPREAD, options)
    while left > 0:
        tried = strategy.ask()
        values = [objective(weights) for weights in tried]
        strategy.tell(tried, values)
        left -= len(tried)
        lowest = min(range(len(tried)), key=values.__getitem__)
        if values[lowest] < least:
            least, best = values[lowest], [float(w) for w in tried[lowest]]
    return best


def few_shot_loss(
    text_model: TextModel, loras: Sequence[Factors], examples: Sequence[Example], batch_size: int
) -> Callable[[list[float]], float]:
    """The mean loss per answer token of weights, on examples, of a model with a LoRA that has room for the sum."""
    encoder, collator = text_model.encoder, text_model.collator
    batches = []
    for at in range(0, len(examples), batch_size):
        part = examples[at : at + batch_size]
        rows = [encoder.prompt(e.prompt) for e in part], [encoder.target(e.target) for e in part], [0] * len(part)
        batches.append(text_model.to_device(collator.answers(*rows)))

    def loss(weights: list[float]) -> float:
        put(text_model.peft, weighted_sum(loras, weights))
        total, tokens = 0.0, 0
        with text_model.evaluating():
            for batch in batches:
                nll, _ = label_nll(text_model.label_logits(batch), batch["labels"])
                total, tokens = total + float(nll.sum()), tokens + int((batch["labels"] != -100).sum())
        return total / tokens

    return loss


@torch.no_grad()
def put(model: nn.Module, factors: Factors) -> None:
    """Give a model's LoRA (alpha equal to its rank) these matrices."""
    for name, (a, b) in factors.items():
        layer: Any = model.base_model.model.get_submodule(name)  # type: ignore[union-attr,operator]
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
