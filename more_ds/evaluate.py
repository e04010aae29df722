"""Scoring a model on tasks: mixed batches over all ranks, metrics over the whole corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from more_ds.errors import UserError
from more_ds.metrics import METRICS, Gold, Prediction, evaluate_metrics, majority_scores, standard_errors
from more_ds.results import GENERATION, LIKELIHOOD, TaskResult
from more_ds.scoring.answering import Answering, Item, prepare
from more_ds.scoring.journal import Journal
from more_ds.tasks import Task
from more_ds.tasks.render import Example, answer_value, content_hash, parse, prompt_hash
from more_ds.text_model import TextModel

MAJORITY_ROWS = 10_000
"""At most this many training answers of a task, evenly spread, decide which is the majority's."""


def training_golds(examples: Sequence[Example]) -> list[Gold]:
    """The answers that the majority baseline of a task is taken from."""
    return [examples[i].gold for i in range(0, len(examples), -(-len(examples) // MAJORITY_ROWS))]


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
    plain_prompts: bool = False,
    infer_task: bool = False,
    label: str | None = "evaluating",
    journal: Journal | None = None,
    between: Callable[[], None] = lambda: None,
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
        resamples: bootstrap resamples for the standard errors; 0: none.
        plain_prompts: whether the examples were made with the tasks' second prompts; recorded, no more.
        infer_task: route every example by the task that its prompt looks like (`more_ds.scoring.task_inference`), not
            by its own; tasks that the adapter does not know may then be scored.
        label: of the progress bar; None: no bar.
        journal: answers of an evaluation that was interrupted, which are taken over, and where answers are kept.
        between: called by all ranks together before each batch; raises to end the evaluation.

    Raises:
        UserError: the adapter does not know a task, or an answer is longer than `max_target_length`.
        ValueError: an unknown mode, or a task without examples.
    """
    if mode not in (LIKELIHOOD, GENERATION):
        raise ValueError(f"mode is {mode!r}; use '{LIKELIHOOD}' or '{GENERATION}'")
    if text_model.routes_by_task and not infer_task:
        check_known([task.name for task in tasks], task_ids)
    items, cut = prepare(text_model, tasks, examples_by_task, task_ids)
    if infer_task:
        finding = label and f"{label}, finding the tasks"
        found = Answering(text_model, items, batch_size, finding, journal, split, between).find_tasks()
        items = [replace(item, task_id=found[i]) for i, item in enumerate(items)]
    ranked = [i for i, item in enumerate(items) if item.options and mode == LIKELIHOOD]
    chosen = set(ranked)
    written = [i for i in range(len(items)) if i not in chosen]
    answering = Answering(text_model, items, batch_size, label, journal, split, between)
    scores = answering.score(ranked, normalise)
    texts = answering.write(written, num_beams)
    results = []
    for task in tasks:
        own = [i for i, item in enumerate(items) if item.task is task]
        records = [_record(items[i], split, scores.get(i), texts.get(i)) for i in own]
        golds = (train_golds or {}).get(task.name)
        prompt = prompt_hash(task, plain=plain_prompts)
        own_golds = [items[i].example.gold for i in own]
        result = _result(task, split, records, own_golds, golds, resamples, cut[task.name], prompt)
        if infer_task and task.name in task_ids:
            right = sum(items[i].task_id == task_ids[task.name] for i in own)
            result = replace(result, task_found=100 * right / len(own))
        results.append(result)
    return results


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


def _record(item: Item, split: str, scores: list[float] | None, text: str | None) -> dict[str, Any]:
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
    resamples: int, cut: int, prompt: str,
) -> TaskResult:  # fmt: skip
    predictions = [record["prediction"] for record in records]
    return TaskResult(
        task=task.name,
        suite=task.suite,
        split=split,
        mode=records[0]["mode"],
        metrics=evaluate_metrics(task, predictions, golds),
        standard_errors=standard_errors(task, predictions, golds, resamples) if resamples else {},
        signatures={name: METRICS[name].signature for name in task.metrics},
        primary=task.primary,
        n=len(records),
        unparsable=sum(prediction is None for prediction in predictions),
        cut=cut,
        majority=majority_scores(task, train_golds, golds) if train_golds else None,
        prompt=prompt,
        data=content_hash([(record["index"], record["gold"]) for record in records]),
        records=records,
    )
