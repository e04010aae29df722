"""A model's answers to the examples of many tasks, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from more_ds.log import Progress
from more_ds.results import GENERATION, LIKELIHOOD
from more_ds.scoring.generation import generate
from more_ds.scoring.journal import Journal, name_of
from more_ds.scoring.likelihood import rank_options, share_prefixes
from more_ds.scoring.task_inference import infer_tasks
from more_ds.tasks import Task
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

R = TypeVar("R")


@dataclass(frozen=True)
class Item:
    """An example made ready: token ids of its prompt and options, and where its text must stop."""

    task: Task
    example: Example
    task_id: int
    prompt: list[int]
    options: tuple[list[int], ...]
    max_new_tokens: int


def prepare(
    text_model: TextModel,
    tasks: Sequence[Task],
    examples_by_task: Mapping[str, Sequence[Example]],
    task_ids: Mapping[str, int],
) -> tuple[list[Item], dict[str, int]]:
    """Every task's examples, and how many prompts of each task had to be cut."""
    items: list[Item] = []
    cut: dict[str, int] = {}
    for task in tasks:
        if not examples_by_task[task.name]:
            raise ValueError(f"task '{task.name}' has no examples")
        before = text_model.encoder.num_cut
        items += _prepare(text_model, task, examples_by_task[task.name], task_ids.get(task.name, 0))
        cut[task.name] = text_model.encoder.num_cut - before
    return items, cut


def _prepare(text_model: TextModel, task: Task, examples: Sequence[Example], task_id: int) -> list[Item]:
    encoder = text_model.encoder
    answers = {text: encoder.target(text) for example in examples for text in example.options}
    longest = max((len(ids) for ids in answers.values()), default=encoder.max_target_length)
    limit = task.max_new_tokens or longest
    return [
        Item(task, e, task_id, encoder.prompt(e.prompt), tuple(answers[text] for text in e.options), limit)
        for e in examples
    ]


def by_task(items: Sequence[Item]) -> list[tuple[int, list[list[int]]]]:
    """The prompts of every task, with the number that it goes by; a task may be found to be several."""
    groups: dict[tuple[str, int], list[list[int]]] = {}
    for item in items:
        groups.setdefault((item.task.name, item.task_id), []).append(item.prompt)
    return [(task_id, prompts) for (_, task_id), prompts in groups.items()]


@dataclass(frozen=True)
class Answering:
    """How a model answers items; answers go by the item's number."""

    text_model: TextModel
    items: Sequence[Item]
    batch_size: int
    label: str | None
    journal: Journal | None
    split: str
    between: Callable[[], None] = lambda: None  # called by all ranks together before each batch

    def score(self, chosen: Sequence[int], normalise: bool) -> dict[int, list[float]]:
        """Log-likelihoods of the options."""
        names = self._names(LIKELIHOOD, chosen)
        left, known = self._left(chosen, names)
        groups = by_task([self.items[i] for i in chosen])  # of all items: the rest of an evaluation scores as the whole
        prefixes = share_prefixes(self.text_model, groups, self.batch_size) if left else None

        def answer(batch: Sequence[Item]) -> list[list[float]]:
            prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
            options = [item.options for item in batch]
            return rank_options(self.text_model, prompts, tasks, options, normalise=normalise, prefixes=prefixes)

        order = sorted(left, key=lambda i: -len(self.items[i].prompt) - max(map(len, self.items[i].options)))
        return known | self._spread(_batches(order, self.batch_size), answer, names, len(chosen))

    def write(self, chosen: Sequence[int], num_beams: int) -> dict[int, str]:
        """Generated texts. A batch has one limit, so that no text depends on its neighbours."""

        def answer(batch: Sequence[Item]) -> list[str]:
            prompts, tasks = [item.prompt for item in batch], [item.task_id for item in batch]
            ids = generate(self.text_model, prompts, tasks, batch[0].max_new_tokens, num_beams)
            return [self.text_model.encoder.decode(row) for row in ids]

        names = self._names(GENERATION, chosen)
        left, known = self._left(chosen, names)
        batches: list[list[int]] = []
        for limit in sorted({self.items[i].max_new_tokens for i in left}, reverse=True):
            own = [i for i in left if self.items[i].max_new_tokens == limit]
            batches += _batches(sorted(own, key=lambda i: -len(self.items[i].prompt)), self.batch_size)
        return known | self._spread(batches, answer, names, len(chosen))

    def find_tasks(self) -> dict[int, int]:
        """The task that every prompt looks like."""

        def answer(batch: Sequence[Item]) -> list[int]:
            return infer_tasks(self.text_model, [item.prompt for item in batch])[0]

        chosen = range(len(self.items))
        names = self._names("task", chosen)
        left, known = self._left(chosen, names)
        order = sorted(left, key=lambda i: -len(self.items[i].prompt))
        return known | self._spread(_batches(order, self.batch_size), answer, names, len(chosen))

    def _names(self, kind: str, chosen: Sequence[int]) -> dict[int, str]:
        """Names of the items' answers in the journal; none without one."""
        names = {}
        for i in chosen if self.journal is not None else ():
            item, example = self.items[i], self.items[i].example
            texts = (example.prompt, *example.options, str(item.max_new_tokens))
            names[i] = name_of(kind, self.split, example.task, example.index, texts)
        return names

    def _left(self, chosen: Sequence[int], names: Mapping[int, str]) -> tuple[list[int], dict[int, Any]]:
        """The items without an answer, and the answers of the others."""
        kept = self.journal.known if self.journal is not None else {}
        known = {i: kept[names[i]] for i in chosen if names.get(i) in kept}
        return [i for i in chosen if i not in known], known

    def _spread(
        self,
        batches: Sequence[Sequence[int]],
        answer: Callable[[Sequence[Item]], list[R]],
        names: Mapping[int, str],
        total: int,
    ) -> dict[int, R]:
        """Let the ranks answer the batches in turn, and give every rank all answers.

        A rank without a batch in the last turn runs the first one again under ZeRO-3, where no rank can run alone, and
        drops the answers.
        """
        size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if size > 1 else 0
        count = sum(map(len, batches))
        bar = Progress(total, self.label, initial=total - count) if self.label is not None and batches else None
        mine: dict[int, R] = {}
        for turn in range(0, len(batches), size):
            self.between()
            is_real = turn + rank < len(batches)
            if is_real or self.text_model.in_step:
                batch = batches[turn + rank] if is_real else batches[0]
                answers = answer([self.items[i] for i in batch])
                own = dict(zip(batch, answers, strict=True)) if is_real else {}
                mine |= own
                if self.journal is not None:
                    self.journal.add({names[i]: value for i, value in own.items()})
            if bar is not None:
                bar.advance(sum(len(batch) for batch in batches[turn : turn + size]))
        if bar is not None:
            bar.close()
        everyone = _gather(mine, size)
        merged = {i: value for part in everyone for i, value in part.items()}
        if sum(map(len, everyone)) != count or len(merged) != count:
            raise RuntimeError(f"{len(merged)} answers for {count} examples; the ranks disagree")
        return merged


def _batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[at : at + size]) for at in range(0, len(order), size)]


def _gather(mine: dict[int, R], size: int) -> list[dict[int, R]]:
    if size == 1:
        return [mine]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, mine)
    return parts
