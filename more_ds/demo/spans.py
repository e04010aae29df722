"""Span corruption, the pretraining of T5: gaps in the input, their text in the output."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from more_ds.demo.text import documents
from more_ds.demo.tokenizer import SENTINELS

Batch = dict[str, torch.Tensor]
IGNORED = -100


class SpanCorruption:
    """Batches of documents with gaps.

    Gaps are single words and short spans, and in half of the documents also the last sentence's
    end: in this language that is where a document says what follows from the rest of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, count: int):
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._stream = documents(seed)
        self._count = count
        self._sentinels = [tokenizer.get_vocab()[f"<extra_id_{i}>"] for i in range(SENTINELS)]

    def batches(self) -> Iterator[Batch]:
        """Yield padded batches: `input_ids`, `attention_mask`, `labels` (-100 where padded)."""
        pad, eos = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        while True:
            texts = list(islice(self._stream, self._count))
            encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            pairs = [self.corrupt(ids) for ids in encoded]
            inputs = pad_rows([[*source, eos] for source, _ in pairs], pad)
            yield {
                "input_ids": inputs,
                "attention_mask": (inputs != pad).long(),
                "labels": pad_rows([[*target, eos] for _, target in pairs], IGNORED),
            }

    def corrupt(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids with sentinels for gaps, and each sentinel with the ids of its gap."""
        source: list[int] = []
        target: list[int] = []
        hidden = self._gaps(len(ids))
        used = 0
        for at, token in enumerate(ids):
            if not hidden[at]:
                source.append(token)
                continue
            if at == 0 or not hidden[at - 1]:
                source.append(self._sentinels[used])
                target.append(self._sentinels[used])
                used += 1
            target.append(token)
        return source, target

    def _gaps(self, length: int) -> list[bool]:
        """Choose which of `length` tokens to hide; always at least one, never all."""
        hidden = [False] * length
        for _ in range(min(max(1, length // 9), SENTINELS // 2)):
            start = self._rng.randrange(length)
            for at in range(start, min(start + self._rng.choice((1, 1, 2, 3)), length)):
                hidden[at] = True
        if self._rng.random() < 0.5:
            for at in range(max(length - self._rng.choice((2, 3, 4)), 1), length):
                hidden[at] = True
        hidden[0] = False
        if not any(hidden):
            hidden[-1] = True
        return hidden


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """Return the rows as one tensor, filled with `value` at their ends."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
