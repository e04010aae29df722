"""BLEU, chrF and TER: sacreBLEU's arithmetic with the conventions of E2E, WebNLG and DART."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sacrebleu.metrics as sacre

from more_ds.compare.bootstrap import Floats
from more_ds.nlg_metrics.text_metric import References, TextMetric, of_texts
from more_ds.nlg_metrics.tokens import words

Prepare = Callable[[Sequence[str], References], tuple[Sequence[str], Sequence[Sequence[str | None]]]]


def _every(texts: Sequence[str], golds: References) -> tuple[Sequence[str], Sequence[Sequence[str | None]]]:
    """All references of every text; a missing one is absent."""
    return texts, [[*refs, *[None] * (max(map(len, golds)) - len(refs))] for refs in golds]


def _three(texts: Sequence[str], golds: References) -> tuple[Sequence[str], Sequence[Sequence[str | None]]]:
    """The first three references of every text, as tokens; a missing one is absent."""
    cut = [tuple(_joined(ref) for ref in refs[:3]) for refs in golds]
    return _every([_joined(text) for text in texts], cut)


def _three_lines(texts: Sequence[str], golds: References) -> tuple[Sequence[str], Sequence[Sequence[str | None]]]:
    """The first three references of every text, as tokens; a missing one is an empty line."""
    texts, rows = _three(texts, golds)
    return texts, [[ref or "" for ref in refs] for refs in rows]


def _joined(text: str) -> str:
    return " ".join(words(text))


def _metric(name: str, scorer: Any, prepare: Prepare, extra: str = "", **fields: Any) -> TextMetric:
    def statistics(texts: Sequence[str], golds: References) -> Floats:
        texts, rows = prepare(texts, golds)
        # These are what sacreBLEU's own significance tests resample; it has no public name for them.
        return np.array(scorer._extract_corpus_statistics(texts, list(zip(*rows, strict=True))), dtype=np.float64)

    def value(sums: Floats) -> float:
        return float(scorer._compute_score_from_stats(sums.tolist()).score)

    scorer.num_refs = -1  # "var" in the signature: every text brings as many as it has
    return TextMetric(name, of_texts(statistics, value), scorer.get_signature().format() + extra, **fields)


BLEU = _metric("bleu", sacre.BLEU(lowercase=True, tokenize="13a", force=True), _every)
"""BLEU (Papineni et al. 2002) with all references, 13a tokenisation, lower case.

For E2E this is within 0.1 of the official script. Absent references are left out, unlike in `multi-bleu.perl`.
"""

BLEU_3REF = _metric(
    "bleu_3ref",
    sacre.BLEU(tokenize="none", smooth_method="none", force=True),
    _three_lines,
    "|text:webnlg2017|refs:first3|absent:empty",
)
"""BLEU as the official scripts of WebNLG 2017 and DART compute it with `multi-bleu.perl` on three reference files.

Text in `words`, at most three references, no smoothing. Where an entry has fewer, the file has an empty line, and the
script takes it for a reference of length 0: a short text then goes without a brevity penalty. `bleu` is without this.
"""

CHRF = _metric("chrf", sacre.CHRF(), _every)
"""chrF2 (Popovic 2015), the best over the references of each text."""

CHRF_PP = _metric("chrf++", sacre.CHRF(word_order=2), _every)
"""chrF2++ (Popovic 2017), of WebNLG 2020: `chrf` with word bigrams."""

_ERRORS: dict[str, Any] = {"high": float("inf"), "higher_is_better": False}

TER = _metric("ter", sacre.TER(), _every, **_ERRORS)
"""Translation edit rate (Snover et al. 2006) on blank-separated words, lower case: lower is better."""

TER_3REF = _metric("ter_3ref", sacre.TER(), _three, "|text:webnlg2017|refs:first3", **_ERRORS)
"""TER as the official scripts of WebNLG 2017 and DART compute it with `tercom`: text in `words`, three references."""
