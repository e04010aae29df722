"""Losses as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast

IGNORED = -100
"""Label of a position which does not count."""


def label_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the labels, in float32.

    Args:
        logits: (batch, length, vocabulary), already aligned: position i predicts labels[:, i].
        labels: (batch, length), `IGNORED` where nothing is predicted.

    Returns:
        (batch,) the sum over the example's label tokens, in nats, and (batch,) their number.
    """
    nll = F.cross_entropy(at_least_float32(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return nll.sum(1), (labels != IGNORED).sum(1)


def contrastive_loss(z: Tensor, embeddings: Tensor, task_ids: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the cosine similarity between pooled inputs and task embeddings (MoRE, equation 8).

    The equation is printed without the minus sign; minimised like that it would push an example away from its own
    task, so the usual sign is used here, as in the published code.

    Args:
        z: (..., batch, width) pooled inputs of one adapted map, or of several.
        embeddings: (..., tasks, width).
        task_ids: (batch,) the example's own task.
        temperature: divides the cosine; 0.05 in the paper.

    Returns:
        Scalar: the mean over the maps and the batch, in nats, computed in float32.
    """
    with without_autocast(z):
        log_p = torch.log_softmax(cosine(z, embeddings) / temperature, dim=-1)
    return -log_p.gather(-1, task_ids.unsqueeze(1).expand(*log_p.shape[:-1], 1)).mean()


def cosine(z: Tensor, embeddings: Tensor) -> Tensor:
    """Cosine similarity of (..., batch, width) with (..., tasks, width): (..., batch, tasks) float32."""
    return F.normalize(at_least_float32(z), dim=-1) @ F.normalize(at_least_float32(embeddings), dim=-1).mT
