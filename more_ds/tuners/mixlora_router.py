"""Which experts of a MixLoRA a token uses, and how much: three routers.

    p = softmax(W_r h)
    top_k     the k highest p, divided by their sum
    dynamic   the highest p until they sum to more than `top_p`, as they are: at least one, and at most all
    switch    the highest p alone, as it is; in training at most `capacity` tokens of a sequence use one expert, the
              later ones get nothing from the FFN, and h is multiplied by noise from [1 - jitter, 1 + jitter] for W_r

Source: the code of MoE-PEFT (`mixlora`, `mixlora-dynamic`, `mixlora-switch`), with its defaults: top_p 0.8, capacity
32, jitter 0.01, z-loss 0.001 and W_r from N(0, 1) for the switch. Deviations: padding takes no capacity; tokens beyond
it get zero, as in Switch Transformers, and not p h; when the model answers there is no capacity (a token at a time
would not know of it), where that code leaves the FFN out altogether.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast


class Routes(NamedTuple):
    """The slots of every token, each an expert and a weight.

    Attributes:
        p: (batch, ..., n) float32.
        weights: (batch, ..., slots); zero where a slot is empty.
        experts: (batch, ..., slots) numbers of experts.
        used: (batch, ..., n) 1 where a token chose an expert.
        z: (batch, ...) squared logarithm of the sum of exp(W_r h).
    """

    p: Tensor
    weights: Tensor
    experts: Tensor
    used: Tensor
    z: Tensor


def route(h: Tensor, router: Tensor, config: Any, training: bool, real: Tensor) -> Routes:
    """Route (batch, ..., d) tokens by a router, (n, d).

    Args:
        h: the tokens.
        router: W_r.
        config: a `MixLoraConfig`.
        training: whether there are capacity and jitter.
        real: (batch, ..., 1) 1 where a token is no padding.
    """
    with without_autocast(h):
        x = at_least_float32(h)
        if config.router == "switch" and training and config.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - config.jitter, 1 + config.jitter)
        logits = F.linear(x, at_least_float32(router))
        p = torch.softmax(logits, dim=-1)
    if config.router == "dynamic":
        weights, experts = p.sort(dim=-1, descending=True)
        kept = (weights.cumsum(-1) - weights <= config.top_p).to(p.dtype)
    else:
        weights, experts = p.topk(1 if config.router == "switch" else config.top_k, dim=-1)
        kept = torch.ones_like(weights)
    masks = F.one_hot(experts, config.experts).to(p.dtype) * kept.unsqueeze(-1)
    used = masks.sum(-2)
    if config.router == "top_k":
        weights = weights / weights.sum(-1, keepdim=True)
    elif config.router == "switch" and training and h.dim() > 2:
        before = (used * real.to(used.dtype)).cumsum(-2)
        kept = ((before * used).sum(-1, keepdim=True) <= config.capacity).to(p.dtype)
    return Routes(p, weights * kept, experts, used, torch.logsumexp(logits, dim=-1).square())
