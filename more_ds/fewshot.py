"""Few-shot transfer: a trained adapter learns one more task from a few examples, over several draws of them.

MoRE is extended by the task, which starts as a copy of one that it knows. Another method that routes by task learns it
in the place of one that it knows; one that does not route learns it with all that it has. What a method does between
the steps of a run, such as AdaLoRA's sharing out of ranks, is not done in so few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PromptEncoderConfig
from torch import Tensor

from more_ds import checkpoint
from more_ds.config import RunConfig
from more_ds.data.mixture import MicroBatch, Mixture
from more_ds.data.sampler import BalancedSampler
from more_ds.ds_config import BatchSizes
from more_ds.engine import Ranks, learning_rate, set_learning_rate, step
from more_ds.errors import TrainingError, UserError
from more_ds.scoring.likelihood import rank_options
from more_ds.scoring.task_inference import infer_tasks
from more_ds.tasks import Task
from more_ds.tasks.render import Example, expand
from more_ds.text_model import TextModel
from more_ds.tuners import MoreConfig

NEAREST = "nearest"
"""The start that the shots choose."""


def lacks_encoder(config: PeftConfig | None) -> bool:
    """Whether an adapter's file holds the prompt that an encoder wrote, without the encoder that was trained."""
    return isinstance(config, PromptEncoderConfig) or getattr(config, "prefix_projection", False)


def draw_shots(task: Task, examples: Sequence[Example], shots: int, seed: int) -> list[Example]:
    """Draw `shots` examples of every class, or `shots` in all where a task has no fixed classes.

    Classes are the labels of a task of kind `labels`. The draw depends on the seed and the examples alone, and a
    smaller one is part of a larger one with the same seed.

    Raises:
        UserError: a class has fewer examples; names it.
    """
    draw = np.random.RandomState(seed)
    names = task.words if task.kind == "labels" else ("",)
    chosen: list[Example] = []
    for i, name in enumerate(names):
        own = [example for example in examples if not name or example.gold == i]
        order = draw.permutation(len(own))
        if len(own) < shots:
            what = f"class '{name}' has" if name else "it has"
            raise UserError(f"task '{task.name}': {shots} shots wanted, and {what} {len(own)} rows; ask for fewer")
        chosen += [own[j] for j in order[:shots]]
    return chosen


def started_from(tensors: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
    """The adapter's tensors with the last task's embedding and rank those of task `source`, in every map.

    Args:
        tensors: from `checkpoint.adapter_tensors`, of an adapter whose last task was added.
        source: number of a task.
    """
    changed = dict(tensors)
    for name, ranks in tensors.items():
        place, _, kind = name.rpartition(".")
        if kind == "more_ranks":
            first = tensors[f"{place}.more_task.weight"]
            row = first[source : source + 1]
            if source >= len(first):
                row = tensors[f"{place}.more_task.added_{source - len(first)}"]
            changed[f"{place}.more_task.added_{len(ranks) - 1 - len(first)}"] = row
            changed[name] = torch.cat([ranks[:-1], ranks[source : source + 1]])
    return changed


@dataclass(frozen=True)
class Draw:
    """What came of one draw of shots.

    Attributes:
        shots: examples of every class (see `draw_shots`).
        seed: of the draw, the order and the dropout.
        init_from: the task that the new one started as; None: the method does not route by task.
        votes: number of shots that chose each task, by name; empty if the start was named.
        loss: of each training step: mean over the label tokens, in nats, plus the weighted contrastive loss.
        untrained: the task's metrics before training, in percent.
        metrics: and after it.
    """

    shots: int
    seed: int
    init_from: str | None
    votes: dict[str, int]
    loss: list[float]
    untrained: dict[str, float]
    metrics: dict[str, float]


class FewShot:
    """A model that learns a task, and starts anew for every draw of shots.

    The model is loaded and sharded once. All methods are called by all ranks together.
    """

    def __init__(
        self, text_model: TextModel, ranks: Ranks, config: RunConfig, sizes: BatchSizes, name: str, known: Sequence[str]
    ) -> None:
        """Remember where every draw begins.

        Args:
            text_model: around the engine; the last task of a MoRE is the one to learn.
            ranks: the processes.
            config: steps, learning rate and its schedule.
            sizes: how a batch is cut.
            name: of the task to learn.
            known: the names of the others, in the order of their numbers; empty where the method does not route by
                task.
        """
        self.text_model, self.ranks, self.config, self.sizes = text_model, ranks, config, sizes
        self.engine: Any = text_model.module
        self.known, self.name = list(known), name
        self.is_extended = isinstance(getattr(text_model.peft, "active_peft_config", None), MoreConfig)
        self.task_id = len(self.known) if self.is_extended else 0
        self._start = checkpoint.adapter_tensors(self.engine)

    def begin(self, shots: Sequence[Example], init_from: str) -> tuple[str | None, dict[str, int]]:
        """Take the model back to its start; the task is a copy of a task that it knows, or stands in its place.

        Args:
            shots: the examples.
            init_from: name of a task, or `nearest`: the one that most shots choose, by their prompt where MoRE's
                embeddings are near to some, else by their answer, which is likeliest as a certain task.

        Returns:
            The name of that task, None where the method does not route by task; and the shots' votes by task name
            (empty if it was named).
        """
        checkpoint.restart(self.engine, self._start)
        if not self.known:
            return None, {}
        votes: Counter[str] = Counter()
        if init_from == NEAREST:
            choose = self._by_prompt if self.is_extended else self._by_answer
            for at in range(0, len(shots), self.config.per_device_eval_batch_size):
                part = shots[at : at + self.config.per_device_eval_batch_size]
                votes.update(self.known[i] for i in choose(part))
            init_from = max(self.known, key=lambda name: votes[name])
        source = self.known.index(init_from)
        if self.is_extended:
            checkpoint.restart(self.engine, started_from(self._start, source))
        else:
            self.task_id = source
        return init_from, dict(votes)

    def _by_prompt(self, shots: Sequence[Example]) -> list[int]:
        prompts = [self.text_model.encoder.prompt(shot.prompt) for shot in shots]
        return infer_tasks(self.text_model, prompts, len(self.known))[0]

    def _by_answer(self, shots: Sequence[Example]) -> list[int]:
        """For each shot the task as which its answer is likeliest."""
        encoder = self.text_model.encoder
        prompts = [encoder.prompt(shot.prompt) for shot in shots]
        answers = [[encoder.target(shot.target)] for shot in shots]
        tasks = range(len(self.known))
        scores = [rank_options(self.text_model, prompts, [task] * len(shots), answers) for task in tasks]
        return [max(tasks, key=lambda task: scores[task][i][0]) for i in range(len(shots))]

    def train(self, shots: Sequence[Example], seed: int) -> list[float]:
        """Train on the shots, over and over; returns the loss of every step.

        Raises:
            TrainingError: a loss is not finite.
        """
        examples = expand(shots)
        groups = self.sizes.total // self.sizes.micro
        sampler = BalancedSampler([len(examples)], group_size=self.sizes.micro, groups_per_step=groups, seed=seed)
        mixture = Mixture([examples], sampler, self.text_model.encoder, self.text_model.collator)
        total = self.config.max_steps or sampler.steps_per_epoch
        self.engine.train()
        losses = []
        for number in range(total):
            set_learning_rate(self.engine, learning_rate(self.config, number, total))
            batches = mixture.micro_batches(
                number, rank=self.ranks.rank, world=self.sizes.world, accumulation=self.sizes.accumulation
            )
            losses.append(self._step(batches, seed * total + number))
        self.engine.eval()
        found = self.ranks.sum(torch.stack(losses)).cpu()
        if not bool(found.isfinite().all()):
            raise TrainingError(f"task '{self.name}', seed {seed}: the loss is not finite; lower learning_rate")
        return [float(loss) for loss in found]

    def _step(self, batches: Sequence[MicroBatch], seed: int) -> Tensor:
        """Take one optimizer step; returns this rank's share of its loss, scalar."""
        pieces = self.sizes.world * self.sizes.accumulation
        tokens = self.ranks.sum(torch.tensor(float(sum(batch.label_tokens for batch in batches))))
        share = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            torch.manual_seed(seed * pieces + batch.slot)
            tensors = {name: tensor.to(self.ranks.device) for name, tensor in batch.tensors.items()}
            tensors["task_ids"].fill_(self.task_id)
            loss, _, _ = self.text_model.training_loss(tensors, pieces / tokens)
            self.engine.backward(loss)
            share += loss.detach() / pieces
            step(self.engine)
        return share


def summary(draws: Sequence[Draw], primary: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of the primary metric, in percent: untrained first, then by number of shots.

    The deviation is that of a sample (n - 1); None for a single draw.
    """
    groups = [(0, [draw.untrained[primary] for draw in draws])]
    for shots in sorted({draw.shots for draw in draws}):
        groups.append((shots, [draw.metrics[primary] for draw in draws if draw.shots == shots]))
    return [
        {"shots": shots, "draws": len(values), "mean": fmean(values),
         "deviation": stdev(values) if len(values) > 1 else None, "lowest": min(values), "highest": max(values)}
        for shots, values in groups
    ]  # fmt: skip
