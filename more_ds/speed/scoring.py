"""What it costs to score closed answers: by likelihood, by generation, and as the published evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from more_ds.scoring.answering import Item, by_task, prepare
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options, share_prefixes
from more_ds.speed.rounds import Ratio, compare
from more_ds.tasks import Task
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

LIKELIHOOD, GENERATION, PUBLISHED = "likelihood", "generation", "published"
PUBLISHED_LENGTH, PUBLISHED_NEW_TOKENS = 128, 10
"""The published evaluation pads every prompt to this many tokens, and lets the model write at most so many."""


def score_speed(
    text_model: TextModel, tasks: Sequence[Task], examples: Mapping[str, Sequence[Example]], *, batch_size: int,
    rounds: int,
) -> dict[str, dict[str, Ratio]]:  # fmt: skip
    """By task, the time of each way over that of `likelihood`.

    `generation` writes no more tokens than the longest answer has and stops when all rows have ended. `published` is
    what MoRE's code does for a batch: prompts padded to 128, `generate` with 10 new tokens (a model that never ends its
    answers writes all of them), and a forward pass for the loss.

    Args:
        text_model: the model.
        tasks: closed ones.
        examples: by task name.
        batch_size: examples that run together.
        rounds: see `compare`.
    """
    found = {}
    for task in tasks:
        items, _ = prepare(text_model, [task], examples, {task.name: 0})
        items.sort(key=lambda item: -len(item.prompt))
        batches = [items[at : at + batch_size] for at in range(0, len(items), batch_size)]
        runs = {
            LIKELIHOOD: partial(_rank, text_model, batches),
            GENERATION: partial(_over, partial(_generate, text_model), batches),
            PUBLISHED: partial(_over, partial(_as_published, text_model), batches),
        }
        found[task.name] = compare(runs, LIKELIHOOD, rounds=rounds)
    return found


def whole_seconds(found: Mapping[str, Mapping[str, Ratio]], times: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each way takes for all tasks, by what `score_speed` found, a task's rows so many times."""
    ways = next(iter(found.values()))
    return {way: sum(ratios[way].seconds * times[task] for task, ratios in found.items()) for way in ways}


def _over(way: Callable[[Sequence[Item]], object], batches: Sequence[Sequence[Item]]) -> None:
    for batch in batches:
        way(batch)


def _rank(text_model: TextModel, batches: Sequence[Sequence[Item]]) -> None:
    prefixes = share_prefixes(text_model, by_task([item for batch in batches for item in batch]), len(batches[0]))
    for batch in batches:
        prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
        rank_options(text_model, prompts, tasks, [item.options for item in batch], prefixes=prefixes)


def _generate(text_model: TextModel, batch: Sequence[Item]) -> object:
    prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
    return generate(text_model, prompts, tasks, batch[0].max_new_tokens)


@torch.no_grad()
def _as_published(text_model: TextModel, batch: Sequence[Item]) -> object:
    collator, pad = text_model.collator, text_model.encoder.pad_id
    prompts, tasks = [item.prompt[:PUBLISHED_LENGTH] for item in batch], [item.task_id for item in batch]
    targets = [item.options[0] for item in batch]
    # One row of full length makes the collator pad the others to it; it is taken out again.
    long = [pad] * PUBLISHED_LENGTH
    padded = {key: value[1:] for key, value in collator.prompts([long, *prompts], [0, *tasks]).items()}
    inputs: dict[str, Any] = text_model.to_device(padded)
    model: Any = text_model.peft
    extras = text_model.extras(inputs)
    model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **extras, do_sample=False,
        max_new_tokens=PUBLISHED_NEW_TOKENS, pad_token_id=pad,
    )  # fmt: skip
    whole = {k: v[1:] for k, v in collator.answers([long, *prompts], [targets[0], *targets], [0, *tasks]).items()}
    return text_model.label_logits(text_model.to_device(whole))
