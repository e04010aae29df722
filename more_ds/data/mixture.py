"""The training data of all tasks as micro-batches of one task each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from more_ds.data.collate import Batch, Collator
from more_ds.data.encoding import Encoder
from more_ds.data.sampler import BalancedSampler
from more_ds.tasks.render import Example


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one micro-batch, and what is known of it without looking at a device.

    Attributes:
        task: index of its task.
        tensors: see `Collator.answers`.
        slot: number of the micro-batch in its optimizer step, over all ranks: the same sample has the same slot
            whatever the number of ranks.
        tokens: real tokens, prompt and answer.
        label_tokens: tokens that count in the loss.
    """

    task: int
    tensors: Batch
    slot: int
    tokens: int
    label_tokens: int


class Mixture:
    """Serves this rank's micro-batches of any optimizer step."""

    def __init__(
        self,
        examples: Sequence[Sequence[Example]],
        sampler: BalancedSampler,
        encoder: Encoder,
        collator: Collator,
    ) -> None:
        """Join data, plan and tokeniser.

        Args:
            examples: training examples by task, in the sampler's order of tasks.
            sampler: the plan.
            encoder: text to ids.
            collator: ids to tensors.
        """
        self.examples, self.sampler, self.encoder, self.collator = examples, sampler, encoder, collator

    def micro_batches(self, step: int, *, rank: int, world: int, accumulation: int) -> list[MicroBatch]:
        """This rank's micro-batches of an optimizer step, one per accumulation slot."""
        parts = self.sampler.micro_batches(step, rank=rank, world_size=world, accumulation=accumulation)
        return [self._collate(task, indices.tolist(), i * world + rank) for i, (task, indices) in enumerate(parts)]

    def _collate(self, task: int, indices: list[int], slot: int) -> MicroBatch:
        rows = [self.examples[task][i] for i in indices]
        prompts = [self.encoder.prompt(row.prompt) for row in rows]
        targets = [self.encoder.target(row.target) for row in rows]
        tensors = self.collator.answers(prompts, targets, [task] * len(rows))
        label_tokens = sum(map(len, targets))
        return MicroBatch(task, tensors, slot, sum(map(len, prompts)) + label_tokens, label_tokens)
