"""ROUGE-L and CIDEr as the COCO caption scorers compute them; the E2E challenge reports these variants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from more_ds.compare.bootstrap import Floats
from more_ds.nlg_metrics.text_metric import References, TextMetric, of_texts
from more_ds.nlg_metrics.tokens import coco

Ngrams = Counter[tuple[str, ...]]

_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0


def _rouge(texts: Sequence[str], golds: References) -> Floats:
    """(examples, 2): the score of each text, and 1."""
    pairs = zip(texts, golds, strict=True)
    return np.array([[_rouge_of(coco(text), [coco(ref) for ref in refs]), 1.0] for text, refs in pairs])


def _rouge_of(text: list[str], refs: Sequence[list[str]]) -> float:
    """F of the best precision and the best recall, which may come from different references."""
    common = [_longest_common_subsequence(text, ref) for ref in refs]
    precision = max(common) / max(len(text), 1)
    recall = max(count / max(len(ref), 1) for count, ref in zip(common, refs, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, all columns of a row at once in the bits of one integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    every = (1 << len(first)) - 1
    row = every
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(first) - row.bit_count()


def _cider(texts: Sequence[str], golds: References) -> Floats:
    """(examples, 2): the score of each text, and 1. Document frequencies count the examples of the whole corpus."""
    found = [_ngrams(coco(text)) for text in texts]
    wanted = [[_ngrams(coco(ref)) for ref in refs] for refs in golds]
    documents: Ngrams = Counter()
    for refs in wanted:
        documents.update({ngram for ref in refs for ngram in ref})
    weights = {ngram: math.log(len(golds) / count) for ngram, count in documents.items()}
    unseen = math.log(len(golds))
    scores = []
    for text, refs in zip(found, wanted, strict=True):
        similar = [_similarity(_Vector(text, weights, unseen), _Vector(ref, weights, unseen)) for ref in refs]
        scores.append([10.0 * sum(similar) / len(similar), 1.0])
    return np.array(scores)


class _Vector:
    """Weighted n-gram counts by order, their norms, and the length that CIDEr's code penalises: in bigrams."""

    def __init__(self, counts: Ngrams, weights: Mapping[tuple[str, ...], float], unseen: float) -> None:
        self.parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            self.parts[len(ngram) - 1][ngram] = count * weights.get(ngram, unseen)
        self.norms = [math.sqrt(sum(value**2 for value in part.values())) for part in self.parts]
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(text: _Vector, ref: _Vector) -> float:
    """Mean over the orders of the clipped cosine, with a Gaussian penalty on the difference in length."""
    cosines = 0.0
    for ours, theirs, a, b in zip(text.parts, ref.parts, text.norms, ref.norms, strict=True):
        if a and b:
            cosines += sum(min(ours[n], theirs[n]) * theirs[n] for n in ours.keys() & theirs.keys()) / (a * b)
    return cosines / _ORDERS * math.exp(-((text.length - ref.length) ** 2) / (2 * _SIGMA**2))


def _ngrams(tokens: Sequence[str]) -> Ngrams:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(tokens) - n + 1))


def _mean(sums: Floats) -> float:
    return float(sums[0] / sums[1])


ROUGE_L = TextMetric(
    "rouge_l", of_texts(_rouge, lambda sums: 100.0 * _mean(sums)), "tok:coco|beta:1.2|refs:best precision, best recall"
)
"""ROUGE-L (Lin 2004) of COCO, in percent: mean of the texts' F with beta 1.2. (`rouge_score` takes beta 1.)"""

CIDER = TextMetric("cider", of_texts(_cider, _mean), "tok:coco|variant:D|n:4|sigma:6|idf:corpus", high=10.0)
"""CIDEr-D (Vedantam et al. 2015) of COCO, from 0 to 10, not in percent."""
