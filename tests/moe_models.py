"""Tiny random mixtures of experts, and MoRE on their stacked weights written out literally."""

from __future__ import annotations

import math
from typing import Any

import torch
from oracle import VOCABULARY, Batch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from more_ds.tuners.more.gated import GatedMap
from more_ds.tuners.more.stacked import MoreExperts

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3,
}  # fmt: skip


def moe(kind: str = "mixtral", **changes: Any) -> Any:
    """A random model in float32: `mixtral`, `qwen3_moe`, or `gpt_oss` (transposed weights with biases)."""
    torch.manual_seed(1)
    shape = {**SHAPE, "num_experts_per_tok": 2, **changes}
    if kind == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**{"intermediate_size": 24, "num_local_experts": 4, **shape}))
    elif kind == "qwen3_moe":
        sizes = {"moe_intermediate_size": 8, "num_experts": 5, "head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **shape}))
    else:
        sizes = {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8}
        model = GptOssForCausalLM(GptOssConfig(**{**sizes, **shape}))
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class LiteralMap:
    """The parameters of one stacked map as leaves, and the equations for one token and one expert."""

    def __init__(self, layer: GatedMap) -> None:
        leaf = {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}
        self.A, self.B = leaf["more_A.default.weight"], leaf["more_B.default.weight"]
        self.W, self.b = leaf["more_gate.default.weight"], leaf["more_gate.default.bias"]
        self.E = leaf["more_task.default.weight"]
        self.leaves = leaf
        self.config = layer.configs["default"]
        self.frozen_ranks = layer.ranks("default").tolist()

    def update(self, x: Tensor, expert: int, task: int) -> Tensor:
        config = self.config
        p = torch.softmax(self.W @ self.E[task] + self.b, dim=0)
        if config.gate == "soft":
            return sum(p[k - 1] * self._expert(x, expert, k) for k in range(1, config.r + 1))
        if config.gate == "frozen":
            return self._expert(x, expert, self.frozen_ranks[task])
        rank = int(p.argmax()) + 1
        return (1.0 + p[rank - 1] - p[rank - 1].detach()) * self._expert(x, expert, rank)

    def _expert(self, x: Tensor, expert: int, rank: int) -> Tensor:
        c = rank / self.config.num_tasks * self.config.lora_alpha / self.config.r
        return c * (self.B[expert][:, :rank] @ (self.A[expert][:rank] @ x))

    def contrastive(self, inputs: Tensor, batch: Batch) -> Tensor:
        """From (batch, length, in)."""
        total = 0.0
        for i, task in enumerate(batch.tasks):
            marked = [inputs[i, j] for j, real in enumerate(batch.source[i]) if real]
            z = sum(marked) / len(marked)
            if self.E.shape[1] != len(z):
                generator = torch.Generator().manual_seed(self.config.seed)
                width = self.E.shape[1]
                z = z @ (torch.randn(len(z), width, generator=generator) / math.sqrt(width)).double()
            near = torch.stack([F.cosine_similarity(z, e, dim=0) for e in self.E]) / self.config.temperature
            total = total - torch.log_softmax(near, 0)[task]
        return total / len(batch.tasks)


class LiteralExperts(nn.Module):
    """A block's experts with what the maps add, token by token; it keeps its maps' contrastive losses."""

    def __init__(self, layer: MoreExperts, base: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.base, self.batch = base, batch
        self.literal = {own.parameter_name: LiteralMap(own) for own in layer.maps}

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        length = len(tokens) // len(self.batch.tasks)
        outputs, inner = [], []
        for n, x in enumerate(tokens):
            task, y, middle = self.batch.tasks[n // length], 0.0, 0.0
            for k, e in enumerate(chosen[n].tolist()):
                h = self._map("gate_up_proj", x, e, task)
                h = self.base._apply_gate(h.unsqueeze(0))[0]
                y = y + weights[n, k] * self._map("down_proj", h, e, task)
                middle = middle + weights[n, k] * h
            outputs.append(y)
            inner.append(middle)
        seen = {"gate_up_proj": tokens, "down_proj": torch.stack(inner)}
        self.terms = [
            own.contrastive(seen[name].view(-1, length, seen[name].shape[1]), self.batch)
            for name, own in self.literal.items()
            if own.config.contrastive_weight > 0
        ]
        return torch.stack(outputs)

    def _map(self, name: str, x: Tensor, expert: int, task: int) -> Tensor:
        weight = getattr(self.base, name)[expert]
        y = (weight.T if self.base.is_transposed else weight) @ x
        if self.base.has_bias:
            y = y + getattr(self.base, f"{name}_bias")[expert]
        own = self.literal.get(name)
        return y if own is None else y + own.update(x, expert, task)


def literal_of(model: Any, base: nn.Module, batch: Batch) -> dict[str, LiteralExperts]:
    """Put literal experts with `model`'s parameters into `base`, an untouched copy of its base model."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MoreExperts):
            parent, _, child = name.rpartition(".")
            found[name] = LiteralExperts(layer, base.get_submodule(name), batch)
            setattr(base.get_submodule(parent), child, found[name])
    return found
