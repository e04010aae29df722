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
        flat: answers of a causal model are not padded, see `answers`.
    """

    pad_id: int
    decoder_start_id: int | None = None
    multiple: int = 1
    flat: bool = False

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

            A flat batch is one row, example behind example, all of one task: `input_ids` and `position_ids`,
            (1, length), of which the latter begin again at 0 with every example and so tell the model who sees whom;
            `prompt_mask` (examples, length); `label_positions` (answer tokens,), whose logits predict `labels`,
            (1, answer tokens); `task_ids` (1,).
        """
        if self.flat:
            return _one_row(prompts, targets, task_ids)
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


def _one_row(prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], task_ids: Sequence[int]) -> Batch:
    pairs = list(zip(prompts, targets, strict=True))
    lengths = [len(prompt) + len(target) for prompt, target in pairs]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    prompt_mask = torch.zeros(len(pairs), sum(lengths), dtype=torch.long)
    for row, start, prompt in zip(prompt_mask, starts, prompts, strict=True):
        row[start : start + len(prompt)] = 1
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    answers = [range(end - len(target), end) for end, target in zip(ends, targets, strict=True)]
    return {
        "input_ids": torch.tensor([[token for pair in pairs for part in pair for token in part]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "prompt_mask": prompt_mask,
        "labels": torch.tensor([[token for target in targets for token in target]]),
        "label_positions": torch.tensor([at - 1 for answer in answers for at in answer]),
        "task_ids": torch.tensor(sorted(set(task_ids)), dtype=torch.long),
    }


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
