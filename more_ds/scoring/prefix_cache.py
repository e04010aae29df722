"""What all prompts of a task begin with, run once for all of them.

A prompt is a template around an example: its first tokens are those of every other example of the task, 5 to 30 % of
GLUE's and up to 40 % of the commonsense suite's. A causal model needs nothing of them later but the keys and values of
its layers, which are computed once and stand before every row of every batch. What is shared is found in the tokens,
not in the template, since a tokeniser may join a template's end to the text that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from more_ds.data.collate import positions
from more_ds.text_model import TextModel

WORTH = 64
"""Tokens that a prefix must save over all rows to be kept: it costs a pass of its own."""
ROOM = 2048
"""At most this many tokens are kept, padding included; those that save most come first."""

Prefix = tuple[int, tuple[int, ...]]
"""A task's number, and the tokens."""


@dataclass(frozen=True)
class Past:
    """What stands before the rows of a batch.

    Attributes:
        lengths: (batch,) tokens of each row's prefix.
        sees: (batch, width) bool, which places of the cache they fill: the last ones.
        cache: of `width` places.
    """

    lengths: Tensor
    sees: Tensor
    cache: Cache


def find_prefixes(groups: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> list[Prefix]:
    """What the prompts of each group begin with, where it is worth keeping; at least one token of a prompt follows it.

    Args:
        groups: a task's number and its prompts' token ids. Several groups may have the same number.
    """
    found: dict[Prefix, int] = {}
    for task_id, prompts in groups:
        # What the first and the last in order share, all that lie between them share.
        first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
        room = min(map(len, prompts)) - 1
        pairs = enumerate(zip(first[:room], last, strict=False))
        tokens = first[: next((i for i, (a, b) in pairs if a != b), room)]
        saved = (len(prompts) - 1) * len(tokens)
        if saved >= WORTH:
            found[task_id, tokens] = saved
    kept: list[Prefix] = []
    for prefix in sorted(found, key=lambda prefix: -found[prefix]):
        longest = max(len(tokens) for _, tokens in [*kept, prefix])
        if (len(kept) + 1) * longest <= ROOM:
            kept.append(prefix)
    return kept


class PrefixCache:
    """The keys and values of prefixes in every layer, each (prefixes, heads, width, head width)."""

    def __init__(self, prefixes: Sequence[Prefix], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep what `run` computed."""
        self.prefixes, self.layers = list(prefixes), list(layers)

    @classmethod
    def run(cls, text_model: TextModel, prefixes: Sequence[Prefix], batch_size: int) -> PrefixCache | None:
        """Run the prefixes through a causal model; None where its cache is something else than every token's own.

        All ranks of a ZeRO-3 group must call with as many prefixes.

        Args:
            text_model: the model, in evaluation.
            prefixes: from `find_prefixes`, one or more.
            batch_size: prefixes that run together.
        """
        batch = text_model.to_device(
            text_model.collator.prompts([tokens for _, tokens in prefixes], [task for task, _ in prefixes])
        )
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for at in range(0, len(prefixes), batch_size):
            rows = {key: value[at : at + batch_size] for key, value in batch.items()}
            mask = rows["attention_mask"]
            kept: dict[str, Any] = {"logits_to_keep": 1} if text_model.keeps_logits else {}
            extras = text_model.extras(rows | {"prompt_mask": mask})
            output = text_model.module(
                input_ids=rows["input_ids"], attention_mask=mask, position_ids=positions(mask), use_cache=True, **kept,
                **extras,
            )  # fmt: skip
            layers = _layers(output.past_key_values, text_model.config.num_hidden_layers, mask.shape[1])
            if layers is None:
                return None
            parts.append(layers)
        joined = [zip(*own, strict=True) for own in zip(*parts, strict=True)]
        return cls(prefixes, [(torch.cat(keys), torch.cat(values)) for keys, values in joined])

    def before(self, prompts: Sequence[Sequence[int]], task_ids: Sequence[int]) -> Past | None:
        """What stands before prompts, which are then run without it; None: nothing stands before any of them."""
        chosen = [self._longest(tuple(prompt), task) for prompt, task in zip(prompts, task_ids, strict=True)]
        counts = [len(self.prefixes[i][1]) if i is not None else 0 for i in chosen]
        if not any(counts):
            return None
        device, width = self.layers[0][0].device, max(counts)
        lengths, rows = (torch.tensor(found, device=device) for found in (counts, [i or 0 for i in chosen]))
        sees = torch.arange(width, 0, -1, device=device) <= lengths[:, None]
        layers: list[Any] = [_Layer(keys[:, :, -width:], values[:, :, -width:], rows) for keys, values in self.layers]
        return Past(lengths, sees, Cache(layers=layers))

    def _longest(self, prompt: tuple[int, ...], task_id: int) -> int | None:
        own = [
            i
            for i, (task, tokens) in enumerate(self.prefixes)
            if task == task_id and len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens
        ]
        return max(own, key=lambda i: len(self.prefixes[i][1]), default=None)


class _Layer(DynamicLayer):
    """A layer of a cache that puts each row's prefix before its keys and values, and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """Remember which prefix each row has."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.prefixes = (keys, values, rows)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows' prefixes and tokens."""
        keys, values, rows = self.prefixes
        return torch.cat([keys[rows], key_states], dim=-2), torch.cat([values[rows], value_states], dim=-2)


def _layers(cache: Any, count: int, width: int) -> list[tuple[Tensor, Tensor]] | None:
    """The keys and values of a cache, if it holds those of `width` tokens in `count` layers and nothing else."""
    layers = getattr(cache, "layers", [])
    if not all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in layers):
        return None
    found = [(layer.keys, layer.values) for layer in layers]
    is_plain = all(tensor.dim() == 4 and tensor.shape[2] == width for both in found for tensor in both)
    return found if is_plain and len(found) == count else None
