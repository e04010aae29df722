"""The training data of all tasks as micro-batches of one task each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from more_ds.data.collate import Batch, Collator
from more_ds.data.encoding import Encoder
from more_ds.data.sampler import BalancedSampler
from more_ds.data.tokens import Tokens
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
        computed: tokens that the model computes, padding included.
    """

    task: int
    tensors: Batch
    slot: int
    tokens: int
    label_tokens: int
    computed: int


class Mixture:
    """Serves this rank's micro-batches of any optimizer step."""

    def __init__(
        self,
        examples: Sequence[Sequence[Example]],
        sampler: BalancedSampler,
        encoder: Encoder,
        collator: Collator,
        tokens: Sequence[Tokens] | None = None,
    ) -> None:
        """Join data, plan and tokeniser.

        Args:
            examples: training examples by task, in the sampler's order of tasks.
            sampler: the plan.
            encoder: text to ids.
            collator: ids to tensors.
            tokens: the examples' ids, if they have been made; the next step is then collated in a thread of its own
                while this one is trained.
        """
        self.examples, self.sampler, self.encoder, self.collator = examples, sampler, encoder, collator
        self.tokens = tokens
        # Without ready tokens the thread would share the tokeniser with the evaluation, which it does not bear.
        self._worker = None if tokens is None else ThreadPoolExecutor(1, "collate")
        self._ahead: tuple[tuple[int, int, int, int], Future[list[MicroBatch]]] | None = None

    def micro_batches(self, step: int, *, rank: int, world: int, accumulation: int) -> list[MicroBatch]:
        """This rank's micro-batches of an optimizer step, one per accumulation slot."""
        if self._worker is None:
            return self._make(step, rank, world, accumulation)
        key = (step, rank, world, accumulation)
        future = self._ahead[1] if self._ahead is not None and self._ahead[0] == key else None
        if future is None:
            if self._ahead is not None:
                self._ahead[1].result()  # the sampler serves one caller at a time
            future = self._worker.submit(self._make, *key)
        batches = future.result()
        following = (step + 1, rank, world, accumulation)
        self._ahead = (following, self._worker.submit(self._make, *following))
        return batches

    def _make(self, step: int, rank: int, world: int, accumulation: int) -> list[MicroBatch]:
        parts = self.sampler.micro_batches(step, rank=rank, world_size=world, accumulation=accumulation)
        return [self._collate(task, indices.tolist(), i * world + rank) for i, (task, indices) in enumerate(parts)]

    def _collate(self, task: int, indices: list[int], slot: int) -> MicroBatch:
        if self.tokens is None:
            rows = [self.examples[task][i] for i in indices]
            prompts = self.encoder.prompts([row.prompt for row in rows])
            targets = self.encoder.targets([row.target for row in rows])
        else:
            prompts = [self.tokens[task].prompt(i) for i in indices]
            targets = [self.tokens[task].target(i) for i in indices]
        tensors = self.collator.answers(prompts, targets, [task] * len(indices))
        label_tokens = sum(map(len, targets))
        computed = tensors["input_ids"].numel()
        if "decoder_input_ids" in tensors:
            computed += tensors["decoder_input_ids"].numel()
        return MicroBatch(task, tensors, slot, sum(map(len, prompts)) + label_tokens, label_tokens, computed)
