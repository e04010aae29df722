"""From text to tokens: one function for training and evaluation, so that both see the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from more_ds.errors import UserError

ANCHOR = "x"
"""Text before a target when it is tokenised, so that its first word carries the space that follows a prompt."""


class Encoder:
    """Tokenises prompts and targets for one model.

    A causal model reads `BOS? prompt target EOS`; an encoder-decoder reads the prompt with its own special tokens and
    writes `target EOS`. BOS stands exactly once where the tokeniser adds one. A prompt that is too long is cut at its
    end, an answer never.

    Attributes:
        num_prompts: prompts encoded so far.
        num_cut: how many of them were cut.
    """

    def __init__(
        self, tokenizer: Any, *, is_encoder_decoder: bool, max_source_length: int, max_target_length: int
    ) -> None:
        """Read the tokeniser's conventions.

        Args:
            tokenizer: a Hugging Face tokeniser.
            is_encoder_decoder: the kind of model.
            max_source_length: most tokens of a prompt, special tokens included.
            max_target_length: most tokens of a target, EOS included.

        Raises:
            UserError: the tokeniser has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("the tokeniser has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.num_prompts = self.num_cut = 0
        self._anchor = self._plain([ANCHOR])[0]
        whole = list(tokenizer(ANCHOR).input_ids)
        start = next(i for i in range(len(whole)) if whole[i : i + len(self._anchor)] == self._anchor)
        self._prefix = whole[:start]
        self._suffix = whole[start + len(self._anchor) :] if is_encoder_decoder else []

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens included."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many prompts; a tokeniser does them together many times faster than one by one."""
        room = self.max_source_length - len(self._prefix) - len(self._suffix)
        rows = []
        for ids in self._plain(texts):
            if self._prefix and ids[: len(self._prefix)] == self._prefix:
                ids = ids[len(self._prefix) :]
            self.num_cut += len(ids) > room
            rows.append([*self._prefix, *ids[:room], *self._suffix])
        self.num_prompts += len(rows)
        return rows

    def target(self, text: str) -> list[int]:
        """Token ids of a target, EOS included.

        Raises:
            UserError: the target is longer than `max_target_length`.
        """
        return self.targets([text])[0]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many targets; see `target`."""
        if self.is_encoder_decoder:
            rows = self._plain(texts)
        else:
            rows = []
            for text, joined in zip(texts, self._plain([f"{ANCHOR} {text}" for text in texts]), strict=True):
                kept = joined[: len(self._anchor)] == self._anchor
                rows.append(joined[len(self._anchor) :] if kept else self._plain([f" {text}"])[0])
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) + 1 > self.max_target_length:
                raise UserError(
                    f"a target has {len(ids) + 1} tokens, more than max_target_length={self.max_target_length}: "
                    f"'{text[:60]}...'; raise max_target_length, for an answer is never cut"
                )
        return [[*ids, self.eos_id] for ids in rows]

    @property
    def signature(self) -> str:
        """What decides the ids beside the text: the tokeniser, its version, the limits."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        special = (self._prefix, self._suffix, self.eos_id, self.is_encoder_decoder)
        limits = (self.max_source_length, self.max_target_length)
        return f"{type(self.tokenizer).__name__} {transformers.__version__} {special} {limits} {rules}"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to EOS, special tokens removed."""
        row = list(ids)
        row = row[: row.index(self.eos_id)] if self.eos_id in row else row
        return str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids]
