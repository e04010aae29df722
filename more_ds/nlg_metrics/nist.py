"""NIST (Doddington 2002) of mteval-13a, with the length penalty of the perl script and of its python port."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from more_ds.compare.bootstrap import Floats
from more_ds.nlg_metrics.text_metric import References, TextMetric, of_texts

Ngrams = Counter[tuple[str, ...]]

_ORDERS = 5
_BETA = -math.log(0.5) / math.log(1.5) ** 2
_tokenise = Tokenizer13a()


def _by_mean_length(texts: Sequence[str], golds: References) -> Floats:
    refs = [[_tokens(ref) for ref in own] for own in golds]
    return _statistics(texts, refs, [sum(map(len, own)) / len(own) for own in refs])


def _by_padded_length(texts: Sequence[str], golds: References) -> Floats:
    """A text with fewer references than others has empty ones, which count in the mean length."""
    refs = [[_tokens(ref) for ref in own] for own in golds]
    return _statistics(texts, refs, [sum(map(len, own)) / max(map(len, golds)) for own in refs])


def _statistics(texts: Sequence[str], refs: Sequence[Sequence[list[str]]], lengths: Sequence[float]) -> Floats:
    """(examples, 11): information matched by order, n-grams written by order, length of the references."""
    information = _information(refs)
    rows = []
    for text, own, length in zip(texts, refs, lengths, strict=True):
        tokens = _tokens(text)
        clipped: Ngrams = Counter()
        for ref in own:
            clipped |= _ngrams(ref)
        matched = [0.0] * _ORDERS
        for ngram, count in (_ngrams(tokens) & clipped).items():
            matched[len(ngram) - 1] += count * information[ngram]
        rows.append([*matched, *(max(len(tokens) - n, 0) for n in range(_ORDERS)), length])
    return np.array(rows)


def _information(refs: Sequence[Sequence[list[str]]]) -> dict[tuple[str, ...], float]:
    """Bits that the last token of an n-gram adds, from the counts of all references."""
    counts: Ngrams = Counter()
    for own in refs:
        for ref in own:
            counts.update(_ngrams(ref))
            counts[()] += len(ref)
    return {ngram: math.log2(counts[ngram[:-1]] / count) for ngram, count in counts.items() if ngram}


def _value(sums: Floats) -> float:
    matched, written, length = sums[:_ORDERS], sums[_ORDERS : 2 * _ORDERS], sums[-1]
    ratio = float(written[0] / length)
    penalty = math.exp(-_BETA * math.log(ratio) ** 2) if 0 < ratio < 1 else float(ratio > 0)
    return penalty * float((matched / np.maximum(written, 1)).sum())


def _tokens(text: str) -> list[str]:
    return _tokenise(text).lower().split()


def _ngrams(tokens: Sequence[str]) -> Ngrams:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(tokens) - n + 1))


NIST = TextMetric("nist", of_texts(_by_mean_length, _value), "case:lc|tok:13a|n:5|length:mean", high=math.inf)
"""NIST, not in percent: the penalty compares with the mean length of each text's references (`pymteval.py`)."""

NIST_MTEVAL = TextMetric(
    "nist_mteval", of_texts(_by_padded_length, _value), "case:lc|tok:13a|n:5|length:mean, absent:0", high=math.inf
)
"""NIST of the perl script, as published for E2E, not in percent.

Its input has the same number of references for every text, the missing ones empty, and it divides the length of all
references by that number. So it expects shorter texts than `nist`, and is never below it.
"""
