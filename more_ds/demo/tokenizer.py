"""A tiny sentencepiece tokeniser of the demo language, as a Hugging Face tokeniser."""

from __future__ import annotations

import io
import json
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

Kind = Literal["llama", "t5"]

SENTINELS = 32
MAX_LENGTH = 512
_WORD = re.compile(r"[a-z]+|[0-9]\.[0-9]|[^\s]")
_COMMON: dict[str, Any] = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}


def train_tokenizer(kind: Kind, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """Train a tokeniser on the words of `texts`, save it in `folder`, and load it from there.

    The LLaMA type falls back to bytes and puts BOS first. The T5 type has sentinels and puts EOS
    last. Each word counts alike, however rare: there is room for each to be one piece.
    """
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    if kind == "llama":
        _save_llama(words, folder)
    else:
        _save_t5(words, folder)
    return AutoTokenizer.from_pretrained(folder)


def _sentencepiece(words: list[str], vocab_size: int, **options: Any) -> bytes:
    """Return a BPE model. One thread: with several the pieces would depend on timing."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        num_threads=1,
        split_by_number=False,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="identity",
        pad_piece="<pad>",
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _save_llama(words: list[str], folder: Path) -> None:
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
    model = _sentencepiece(words, 1216, byte_fallback=True, **ids)
    (folder / "tokenizer.model").write_bytes(model)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        **_COMMON,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": MAX_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _save_t5(words: list[str], folder: Path) -> None:
    """Save the pieces as T5's unigram model, with scores under which fewer pieces always win.

    sentencepiece's own unigram training prunes most whole words from so small a vocabulary.
    """
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    model = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece(words, 960, **ids))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = [(piece, -10.0 - rank / len(pieces) / 100) for rank, piece in enumerate(pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=SENTINELS, model_max_length=MAX_LENGTH, **_COMMON)
    tokenizer.save_pretrained(folder)
