"""Sentencepiece tokenisers of the LLaMA and the T5 type, trained on text, as Hugging Face folders."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

Kind = Literal["llama", "t5"]

_COMMON: dict[str, Any] = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
_LLAMA_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
_T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train_sentencepiece(
    kind: Kind, sentences: Iterable[str], folder: Path, *, vocab_size: int, sentinels: int, max_length: int,
    **options: Any,
) -> PreTrainedTokenizerBase:  # fmt: skip
    """Train a BPE tokeniser, save it in `folder`, and load it from there.

    The LLaMA type falls back to bytes and puts BOS first. The T5 type has sentinels and puts EOS last.

    Args:
        kind: its type.
        sentences: text to learn pieces from.
        folder: exists.
        vocab_size: pieces; sentinels come on top.
        sentinels: `<extra_id_0>` and so on, of the T5 type.
        max_length: what the tokeniser says a model can read.
        options: of sentencepiece's trainer.

    Raises:
        RuntimeError: the text has too few different words for so many pieces; sentencepiece says how many it has.
    """
    ids: dict[str, Any] = {**_LLAMA_IDS, "byte_fallback": True} if kind == "llama" else _T5_IDS
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        num_threads=1,  # with several the pieces would depend on timing
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="identity",
        pad_piece="<pad>",
        minloglevel=2,
        **ids,
        **options,
    )
    if kind == "llama":
        _save_llama(model.getvalue(), folder, max_length)
    else:
        _save_t5(model.getvalue(), folder, sentinels, max_length)
    return AutoTokenizer.from_pretrained(folder)


def _save_llama(model: bytes, folder: Path, max_length: int) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        **_COMMON,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def _save_t5(model: bytes, folder: Path, sentinels: int, max_length: int) -> None:
    """Save the pieces as T5's unigram model, with scores under which fewer pieces always win.

    sentencepiece's own unigram training prunes most whole words from a small vocabulary.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = [(piece, -10.0 - rank / len(pieces) / 100) for rank, piece in enumerate(pieces)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=sentinels, model_max_length=max_length, **_COMMON)
    tokenizer.save_pretrained(folder)
