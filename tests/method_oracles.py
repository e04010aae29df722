"""The equations of the methods, token by token in float64, from the parameters of an `Update`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Tensor]


def softmax(values: Tensor) -> Tensor:
    powers = torch.stack([torch.exp(v - values.max()) for v in values])
    return powers / sum(powers)


def moelora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    size = config.r // config.experts
    weights = softmax(p["gate"] @ p["task"][task])
    blocks = [slice(i * size, (i + 1) * size) for i in range(config.experts)]
    return (
        config.lora_alpha
        / config.r
        * sum(w * p["B"][:, block] @ (p["A"][block] @ x) for w, block in zip(weights, blocks, strict=True))
    )


def multilora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    total = torch.zeros_like(output)
    for i in range(config.branches):
        total += p["s"][:, i] * (p["B"][:, i] @ (p["A"][i * config.r : (i + 1) * config.r] @ x))
    return config.lora_alpha / config.r * total


def mtl_lora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    weights = softmax(p["w"][task] / config.temperature)
    own = sum(w * p["B"][:, j * config.r : (j + 1) * config.r] for j, w in enumerate(weights))
    return config.lora_alpha / config.r * own @ (p["L"][task] @ (p["A"] @ x))


def hydralora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    weights = softmax(p["router"] @ x)
    heads = [p["B"][:, j * config.r : (j + 1) * config.r] @ (p["A"] @ x) for j in range(config.heads)]
    return config.lora_alpha / config.r * sum(w * head for w, head in zip(weights, heads, strict=True))


def smora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    weights = softmax(p["router"] @ x)
    ranked = sorted(range(config.r), key=lambda j: -(weights[j] + config.balance_rate * p["moves"][j]).item())
    used = ranked[: config.top_k]
    return config.lora_alpha / config.top_k * sum(weights[j] * p["B"][:, j] * (p["A"][j] @ x) for j in used)


def dylora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    b = config.rank or config.r
    return config.lora_alpha / b * p["B"][:, :b] @ (p["A"][:b] @ x)


def sora(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    return config.lora_alpha / config.r * p["B"] @ torch.diag(p["g"]) @ p["A"] @ x


def bitfit(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    return p["bias"]


def houlsby(p: Numbers, config: Any, x: Tensor, task: int, output: Tensor) -> Tensor:
    h = p["down"] @ output + p["down_bias"]
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return p["up"] @ gelu + p["up_bias"]


ORACLES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (moelora, multilora, mtl_lora, hydralora, smora, dylora, sora, bitfit, houlsby)
}
