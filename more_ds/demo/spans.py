"""Gaps in the demo's documents, for T5's pretraining."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from more_ds.demo.text import documents
from more_ds.demo.tokenizer import SENTINELS
from more_ds.pretrain.spans import Batch, corrupt, seq2seq_batch


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
        """Yield padded batches, see `seq2seq_batch`."""
        pad, eos = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        while True:
            texts = list(islice(self._stream, self._count))
            encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            yield seq2seq_batch([self.corrupt(ids) for ids in encoded], pad, eos)

    def corrupt(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids with sentinels for gaps, and each sentinel with the ids of its gap."""
        return corrupt(ids, self._gaps(len(ids)), self._sentinels)

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
