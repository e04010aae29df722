"""A tiny sentencepiece tokeniser of the demo language, as a Hugging Face tokeniser."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from more_ds.pretrain.tokenizer import Kind, train_sentencepiece

SENTINELS = 32
MAX_LENGTH = 512
PIECES = {"llama": 1216, "t5": 960}
_WORD = re.compile(r"[a-z]+|[0-9]\.[0-9]|[^\s]")


def train_tokenizer(kind: Kind, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """Train a tokeniser on the words of `texts`, save it in `folder`, and load it from there.

    Each word counts alike, however rare: there is room for each to be one piece.
    """
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    return train_sentencepiece(
        kind, words * 20, folder, vocab_size=PIECES[kind], sentinels=SENTINELS, max_length=MAX_LENGTH,
        split_by_number=False, character_coverage=1.0,
    )  # fmt: skip
