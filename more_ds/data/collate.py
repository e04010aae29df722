"""From token ids to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from more_ds.losses import IGNORED

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Collator:
    """Pads to the longest row of the batch.

    A causal batch is padded on the left, so that the answers end together: the vocabulary is projected for the last
    positions alone, and generation starts from the same tensors. An encoder-decoder batch is padded on the right.

    Attributes:
        pad_id: id of the padding token.
        decoder_start_id: first token of the decoder; None for a causal model.
        multiple: rows are padded to a multiple of this length, so that there are few shapes.
    """

    pad_id: int
    decoder_start_id: int | None = None
    multiple: int = 1

    def prompts(self, prompts: Sequence[Sequence[int]], task_ids: Sequence[int]) -> Batch:
        """The batch without answers: `input_ids`, `attention_mask`, (batch, length), and `task_ids`, (batch,)."""
        ids, mask = _pad(prompts, self.pad_id, left=self.decoder_start_id is None, multiple=self.multiple)
        return {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor(task_ids, dtype=torch.long)}

    def answers(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], task_ids: Sequence[int]
    ) -> Batch:
        """The batch with answers.

        Returns:
            `input_ids`, `attention_mask`, `prompt_mask` (batch, length); `labels` (batch, answer length), `IGNORED`
            where a row has no answer token; `task_ids` (batch,). An encoder-decoder's batch has `decoder_input_ids`
            and `decoder_attention_mask`, (batch, answer length), too.
        """
        if self.decoder_start_id is None:
            rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
            batch = self.prompts(rows, task_ids)
            batch["labels"], _ = _pad(targets, IGNORED, left=True)
            answer = torch.zeros_like(batch["attention_mask"])
            answer[:, -batch["labels"].shape[1] :] = (batch["labels"] != IGNORED).long()
            batch["prompt_mask"] = batch["attention_mask"] - answer
            return batch
        batch = self.prompts(prompts, task_ids)
        batch["prompt_mask"] = batch["attention_mask"]
        batch["labels"], batch["decoder_attention_mask"] = _pad(targets, IGNORED, left=False)
        shifted = batch["labels"].roll(1, dims=1)
        shifted[:, 0] = self.decoder_start_id
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, self.pad_id)
        return batch


def positions(attention_mask: Tensor) -> Tensor:
    """Position of every token counted over the real ones, (batch, length); padding gets 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pad rows to the longest: the ids and the mask of real tokens, (rows, length) long."""
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), length), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask
