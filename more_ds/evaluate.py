"""Scoring a model on tasks: mixed batches over all ranks, metrics over the whole corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from more_ds.errors import UserError
from more_ds.generation import generate
from more_ds.log import Progress
from more_ds.metrics import METRICS, Gold, Prediction, evaluate_metrics, majority_scores
from more_ds.results import GENERATION, LIKELIHOOD, TaskResult
from more_ds.scoring import rank_options
from more_ds.tasks import Task
from more_ds.tasks.render import Example, answer_value, parse
from more_ds.text_model import TextModel

R = TypeVar("R")


@dataclass(frozen=True)
class _Item:
    """An example made ready: token ids of its prompt and options, and where its text must stop."""

    task: Task
    example: Example
    task_id: int
    prompt: list[int]
    options: tuple[list[int], ...]
    max_new_tokens: int


def evaluate(
    text_model: TextModel,
    tasks: Sequence[Task],
    examples_by_task: Mapping[str, Sequence[Example]],
    *,
    task_ids: Mapping[str, int],
    batch_size: int,
    mode: str = LIKELIHOOD,
    split: str = "validation",
    num_beams: int = 1,
    normalise: bool = False,
    train_golds: Mapping[str, Sequence[Gold]] | None = None,
    resamples: int = 0,
    label: str | None = "evaluating",
) -> list[TaskResult]:
    """Score a model on every task, the same on every rank.

    Batches mix the tasks and hold examples of like length, the longest first; ranks take them in turn, and the
    answers are gathered before any metric is computed. So nothing depends on the batch size or the number of ranks,
    beyond the rounding of the arithmetic. In a distributed run every rank calls with the same arguments.

    Args:
        text_model: the model; left in the mode (training or not) that it is in.
        tasks: what to score, in the order of the results.
        examples_by_task: the examples of every task, by its name.
        task_ids: the number under which the adapter knows each task, by name; not asked for where the model does
            not route by task.
        batch_size: examples per batch and rank.
        mode: how closed answers are given: `likelihood` ranks the options, `generation` writes text and parses it.
            Free text is always written.
        split: a name for the results.
        num_beams: of generation; 1 is greedy.
        normalise: divide an option's log-likelihood by its number of tokens.
        train_golds: the training answers by task, for the majority baseline.
        resamples: bootstrap resamples for the standard error of the primary metric of closed tasks; 0: none.
        label: of the progress bar; None: no bar.

    Raises:
        UserError: the adapter does not know a task, or an answer is longer than `max_target_length`.
        ValueError: an unknown mode, or a task without examples.
    """
    if mode not in (LIKELIHOOD, GENERATION):
        raise ValueError(f"mode is {mode!r}; use '{LIKELIHOOD}' or '{GENERATION}'")
    if text_model.routes_by_task:
        check_known([task.name for task in tasks], task_ids)
    items, cut = _prepare_all(text_model, tasks, examples_by_task, task_ids)
    ranked = [i for i, item in enumerate(items) if item.options and mode == LIKELIHOOD]
    chosen = set(ranked)
    written = [i for i in range(len(items)) if i not in chosen]
    scores = _score(text_model, items, ranked, batch_size, normalise, label)
    texts = _write(text_model, items, written, batch_size, num_beams, label)
    results = []
    for task in tasks:
        own = [i for i, item in enumerate(items) if item.task is task]
        records = [_record(items[i], split, scores.get(i), texts.get(i)) for i in own]
        golds = (train_golds or {}).get(task.name)
        results.append(_result(task, split, records, [items[i].example.gold for i in own], golds, resamples, cut))
    return results


def standard_error(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold], resamples: int, seed: int = 0
) -> float:
    """Standard deviation of the task's primary metric over bootstrap resamples of the examples, in percent."""
    draw = np.random.default_rng(seed)
    metric = METRICS[task.primary].fn
    values = []
    for _ in range(resamples):
        rows = draw.integers(len(golds), size=len(golds)).tolist()
        values.append(metric([predictions[i] for i in rows], [golds[i] for i in rows]))
    return float(np.std(values, ddof=1))


def check_known(names: Sequence[str], task_ids: Mapping[str, int]) -> None:
    """Refuse tasks that an adapter was not trained on.

    Raises:
        UserError: naming those it knows.
    """
    unknown = [name for name in names if name not in task_ids]
    if unknown and not task_ids:
        raise UserError("the adapter does not name its tasks; write them, in order, as task_names in its config")
    if unknown:
        raise UserError(
            f"the adapter does not know {', '.join(repr(name) for name in unknown)}; it knows: "
            f"{', '.join(task_ids)}; choose among these, or name one to stand in with --as_task"
        )


def _prepare_all(
    text_model: TextModel,
    tasks: Sequence[Task],
    examples_by_task: Mapping[str, Sequence[Example]],
    task_ids: Mapping[str, int],
) -> tuple[list[_Item], dict[str, int]]:
    """Every task's examples, and how many prompts of each task had to be cut."""
    items: list[_Item] = []
    cut: dict[str, int] = {}
    for task in tasks:
        if not examples_by_task[task.name]:
            raise ValueError(f"task '{task.name}' has no examples")
        before = text_model.encoder.num_cut
        items += _prepare(text_model, task, examples_by_task[task.name], task_ids.get(task.name, 0))
        cut[task.name] = text_model.encoder.num_cut - before
    return items, cut


def _prepare(text_model: TextModel, task: Task, examples: Sequence[Example], task_id: int) -> list[_Item]:
    encoder = text_model.encoder
    answers = {text: encoder.target(text) for example in examples for text in example.options}
    longest = max((len(ids) for ids in answers.values()), default=encoder.max_target_length)
    limit = task.max_new_tokens or longest
    return [
        _Item(task, e, task_id, encoder.prompt(e.prompt), tuple(answers[text] for text in e.options), limit)
        for e in examples
    ]


def _score(
    text_model: TextModel, items: Sequence[_Item], chosen: Sequence[int], batch_size: int, normalise: bool,
    label: str | None,
) -> dict[int, list[float]]:  # fmt: skip
    """Log-likelihoods of the options, by the item's number."""

    def answer(batch: Sequence[_Item]) -> list[list[float]]:
        prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
        return rank_options(text_model, prompts, tasks, [item.options for item in batch], normalise=normalise)

    order = sorted(chosen, key=lambda i: -len(items[i].prompt) - max(map(len, items[i].options)))
    return _spread(text_model, items, _batches(order, batch_size), answer, label)


def _write(
    text_model: TextModel, items: Sequence[_Item], chosen: Sequence[int], batch_size: int, num_beams: int,
    label: str | None,
) -> dict[int, str]:  # fmt: skip
    """Generated texts, by the item's number. A batch has one limit, so that no text depends on its neighbours."""

    def answer(batch: Sequence[_Item]) -> list[str]:
        prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
        ids = generate(text_model, prompts, tasks, batch[0].max_new_tokens, num_beams)
        return [text_model.encoder.decode(row) for row in ids]

    batches: list[list[int]] = []
    for limit in sorted({items[i].max_new_tokens for i in chosen}, reverse=True):
        own = [i for i in chosen if items[i].max_new_tokens == limit]
        batches += _batches(sorted(own, key=lambda i: -len(items[i].prompt)), batch_size)
    return _spread(text_model, items, batches, answer, label)


def _batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[at : at + size]) for at in range(0, len(order), size)]


def _spread(
    text_model: TextModel,
    items: Sequence[_Item],
    batches: Sequence[Sequence[int]],
    answer: Callable[[Sequence[_Item]], list[R]],
    label: str | None,
) -> dict[int, R]:
    """Let the ranks answer the batches in turn, and give every rank all answers, by the item's number.

    A rank without a batch in the last turn runs the first one again under ZeRO-3, where no rank can run alone, and
    drops the answers.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    together = text_model.in_step
    bar = Progress(sum(map(len, batches)), label) if label is not None and batches else None
    mine: dict[int, R] = {}
    for turn in range(0, len(batches), size):
        is_real = turn + rank < len(batches)
        if is_real or together:
            batch = batches[turn + rank] if is_real else batches[0]
            answers = answer([items[i] for i in batch])
            mine.update(zip(batch, answers, strict=True) if is_real else ())
        if bar is not None:
            bar.advance(sum(len(batch) for batch in batches[turn : turn + size]))
    if bar is not None:
        bar.close()
    everyone = _gather(mine, size)
    merged = {i: value for part in everyone for i, value in part.items()}
    if sum(map(len, everyone)) != sum(map(len, batches)) or len(merged) != sum(map(len, batches)):
        raise RuntimeError(f"{len(merged)} answers for {sum(map(len, batches))} examples; the ranks disagree")
    return merged


def _gather(mine: dict[int, R], size: int) -> list[dict[int, R]]:
    if size == 1:
        return [mine]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, mine)
    return parts


def _record(item: _Item, split: str, scores: list[float] | None, text: str | None) -> dict[str, Any]:
    """One example's row of `predictions.jsonl`."""
    example = item.example
    if scores is not None:
        prediction: Prediction = answer_value(item.task, max(range(len(scores)), key=scores.__getitem__))
    else:
        prediction = parse(item.task, text or "", example)
    return {
        "task": example.task,
        "split": split,
        "mode": GENERATION if scores is None else LIKELIHOOD,
        "index": example.index,
        "prompt": example.prompt,
        "options": list(example.options),
        "scores": scores,
        "text": text,
        "prediction": prediction,
        "gold": list(example.gold) if isinstance(example.gold, tuple) else example.gold,
    }


def _result(
    task: Task, split: str, records: list[dict[str, Any]], golds: Sequence[Gold], train_golds: Sequence[Gold] | None,
    resamples: int, cut: Mapping[str, int],
) -> TaskResult:  # fmt: skip
    predictions = [record["prediction"] for record in records]
    resampled = resamples > 0 and task.kind != "text"
    return TaskResult(
        task=task.name,
        split=split,
        mode=records[0]["mode"],
        metrics=evaluate_metrics(task, predictions, golds),
        primary=task.primary,
        n=len(records),
        unparsable=sum(prediction is None for prediction in predictions),
        cut=cut[task.name],
        majority=majority_scores(task, train_golds, golds) if train_golds else None,
        standard_error=standard_error(task, predictions, golds, resamples) if resampled else None,
        records=records,
    )
