"""Metrics of generated text against references, each as the official script of its data set computes it.

Two variants of a metric are two metrics: `bleu` and `bleu_3ref`, `nist` and `nist_mteval`.
"""

from __future__ import annotations

from more_ds.nlg_metrics.coco import CIDER, ROUGE_L
from more_ds.nlg_metrics.meteor import METEOR, METEOR_3REF
from more_ds.nlg_metrics.nist import NIST, NIST_MTEVAL
from more_ds.nlg_metrics.sacre import BLEU, BLEU_3REF, CHRF, CHRF_PP, TER, TER_3REF
from more_ds.nlg_metrics.text_metric import TextMetric

__all__ = ["TEXT_METRICS", "TextMetric"]

TEXT_METRICS: tuple[TextMetric, ...] = (
    *(BLEU, BLEU_3REF, CHRF, CHRF_PP, TER, TER_3REF),
    *(ROUGE_L, CIDER, NIST, NIST_MTEVAL, METEOR, METEOR_3REF),
)
