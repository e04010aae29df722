"""What a backbone learns from blocks of text: the next token, or the text of gaps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from more_ds.errors import UserError
from more_ds.losses import IGNORED, label_nll
from more_ds.pretrain.corpus import Blocks
from more_ds.pretrain.spans import Batch, corrupt, random_spans, seq2seq_batch


@dataclass(frozen=True)
class Objective:
    """From blocks to batches.

    Attributes:
        tokenizer: of the blocks.
        gaps: span corruption for an encoder-decoder model; False: the next token, for a causal one.
        density: share of the tokens that gaps hide.
        mean_span: tokens of a gap.
        seed: of the gaps.
    """

    tokenizer: PreTrainedTokenizerBase
    gaps: bool
    density: float = 0.15
    mean_span: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a tokeniser without sentinels where there are to be gaps.

        Raises:
            UserError: so it is.
        """
        if self.gaps and not self.sentinels:
            raise UserError(
                "span corruption needs a tokeniser with <extra_id_0>, <extra_id_1> ...; leave --tokenizer out"
            )

    @property
    def sentinels(self) -> list[int]:
        """Ids of the marks of gaps."""
        vocabulary = self.tokenizer.get_vocab()
        names = (f"<extra_id_{i}>" for i in range(len(vocabulary)))
        found: list[int] = []
        for name in names:
            if name not in vocabulary:
                break
            found.append(vocabulary[name])
        return found

    def batch(self, blocks: Blocks, numbers: Sequence[int], step: int) -> Batch:
        """The batch of some blocks; its gaps are a function of (seed, step, block)."""
        if not self.gaps:
            ids = torch.from_numpy(blocks[list(numbers)].astype("int64"))
            return {"input_ids": ids, "labels": ids.clone()}
        sentinels = self.sentinels
        pairs = []
        for number in numbers:
            ids = blocks[number].tolist()
            rng = random.Random(f"{self.seed} {step} {number}")
            hidden = random_spans(len(ids), self.density, self.mean_span, len(sentinels), rng)
            pairs.append(corrupt(ids, hidden, sentinels))
        return seq2seq_batch(pairs, int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id))

    def nll(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum of the labels' negative log-likelihood, in nats; the first token of a causal block has no label."""
        if self.gaps:
            return label_nll(logits, batch["labels"])[0].sum()
        return label_nll(logits[:, :-1], batch["labels"][:, 1:])[0].sum()

    def labels(self, batch: Batch) -> int:
        """Number of labels in a batch."""
        labels = batch["labels"] if self.gaps else batch["labels"][:, 1:]
        return int((labels != IGNORED).sum())
