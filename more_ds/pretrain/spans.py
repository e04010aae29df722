"""Span corruption, the pretraining of T5: gaps in the input, their text in the output."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch

from more_ds.losses import IGNORED

Batch = dict[str, torch.Tensor]


def corrupt(ids: Sequence[int], hidden: Sequence[bool], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Put a sentinel in the place of each run of hidden ids.

    Args:
        ids: a text.
        hidden: which of the ids are hidden.
        sentinels: one for each run, in their order.

    Returns:
        The ids with sentinels for gaps, and each sentinel with the ids of its gap.
    """
    source: list[int] = []
    target: list[int] = []
    used = 0
    for at, token in enumerate(ids):
        if not hidden[at]:
            source.append(token)
            continue
        if at == 0 or not hidden[at - 1]:
            source.append(sentinels[used])
            target.append(sentinels[used])
            used += 1
        target.append(token)
    return source, target


def random_spans(length: int, density: float, mean_span: float, most: int, rng: random.Random) -> list[bool]:
    """Which of `length` ids to hide: spans of random lengths, with text before each.

    As in T5 (Raffel et al., 2020, section 3.1.4): `density` of the ids, in spans of `mean_span` ids on average; the
    hidden and the seen ids are each cut at random places into as many parts.

    Args:
        length: at least 2.
        density: share of the ids that is hidden.
        mean_span: ids of a span.
        most: spans at most, one for each sentinel.
        rng: draws the cuts.
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), most, length - noise)
    hidden: list[bool] = []
    for seen, gap in zip(_parts(length - noise, spans, rng), _parts(noise, spans, rng), strict=True):
        hidden += [False] * seen + [True] * gap
    return hidden


def seq2seq_batch(pairs: Sequence[tuple[list[int], list[int]]], pad: int, eos: int) -> Batch:
    """Pairs as a padded batch: `input_ids`, `attention_mask`, `labels` (-100 where padded); both sides end in EOS."""
    inputs = pad_rows([[*source, eos] for source, _ in pairs], pad)
    return {
        "input_ids": inputs,
        "attention_mask": (inputs != pad).long(),
        "labels": pad_rows([[*target, eos] for _, target in pairs], IGNORED),
    }


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """Return the rows as one tensor, filled with `value` at their ends."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """`total` as a sum of `count` numbers above zero, each such sum as likely as any other."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [end - begin for begin, end in pairwise(cuts)]
