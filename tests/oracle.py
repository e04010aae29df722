"""MoRE written out literally, and the tiny models it is compared on.

Every example and every token is a Python loop, A and B are sliced, ranks are Python ints, all in float64. The
equations are the paper's (2 to 6, 8, 10) and the switches those of `MoreConfig`; nothing is shared with the
implementation but the draw of the random subsets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from more_ds import MoreConfig
from more_ds.tuners.more import MoreLinear, expert_table

VOCABULARY = 40


class Oracle:
    """One adapted map: parameters copied from a `MoreLinear` as leaves, so that their gradients can be compared."""

    def __init__(self, layer: MoreLinear, adapter: str = "default") -> None:
        leaf = {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}
        self.A, self.B = leaf[f"more_A.{adapter}.weight"], leaf[f"more_B.{adapter}.weight"]
        self.W, self.b = leaf[f"more_gate.{adapter}.weight"], leaf[f"more_gate.{adapter}.bias"]
        self.E = leaf[f"more_task.{adapter}.weight"]
        self.config = layer.configs[adapter]
        self.frozen_ranks = layer.ranks(adapter).tolist()

    def gradients(self) -> dict[str, Tensor]:
        """By the parameter's name in the layer; zero where no gradient came."""
        leaves = {"more_A": self.A, "more_B": self.B, "more_gate.weight": self.W, "more_gate.bias": self.b}
        leaves["more_task"] = self.E
        return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}

    def update(self, x: Tensor, tasks: list[int], masks: list[list[int]], in_decoder: bool = False) -> Tensor:
        """What the adapter adds: (batch, length, in) to (batch, length, out)."""
        how = "first" if in_decoder else self.config.pooling
        return torch.stack([self._example(x[i], t, masks[i], how) for i, t in enumerate(tasks)])

    def _example(self, x: Tensor, task: int, mask: list[int], how: str) -> Tensor:
        config = self.config
        gate_input = self.E[task] if config.gate_input == "task" else self.pool(x, mask, how)
        p = torch.softmax(self.W @ gate_input + self.b, dim=0)
        if config.gate == "soft":
            return sum(p[k - 1] * self._expert(x, k) for k in range(1, config.r + 1))
        rank = int(p.argmax()) + 1
        if config.gate == "frozen":
            return self._expert(x, self.frozen_ranks[task] if config.gate_input == "task" else rank)
        if config.gate == "ste_all":
            s = [p[k - 1] - p[k - 1].detach() + float(k == rank) for k in range(1, config.r + 1)]
            return sum(s[k - 1] * self._expert(x, k) for k in range(1, config.r + 1))
        straight_through = 1.0 + p[rank - 1] - p[rank - 1].detach()
        return straight_through * self._expert(x, rank)

    def _expert(self, x: Tensor, rank: int) -> Tensor:
        """(alpha / r) * c * B_t A_t x for every token of one example."""
        config, scaling = self.config, self.config.lora_alpha / self.config.r
        if config.experts == "prefix" and config.scale != "component":
            c = rank / config.num_tasks if config.scale == "rank" else 1.0
            return torch.stack([scaling * c * (self.B[:, :rank] @ (self.A[:rank, :] @ token)) for token in x])
        members = range(1, rank + 1)
        if config.experts == "subset":
            row = expert_table(config.r, config.num_tasks, "none", "subset", config.seed)[rank - 1]
            members = [j + 1 for j in range(config.r) if row[j] > 0]
        c = {
            "rank": lambda j: rank / config.num_tasks,
            "component": lambda j: (j / config.r) ** 2,
            "none": lambda j: 1.0,
        }
        return sum(scaling * c[config.scale](j) * torch.outer(x @ self.A[j - 1], self.B[:, j - 1]) for j in members)

    def pool(self, x: Tensor, mask: list[int], how: str) -> Tensor:
        """One example's (length, in) over its marked tokens, in the width of the embeddings."""
        marked = [x[i] for i in range(len(mask)) if mask[i]]
        z = {"mean": sum(marked) / len(marked), "first": marked[0], "last": marked[-1]}[how]
        width = self.E.shape[1]
        if width == len(z):
            return z
        generator = torch.Generator().manual_seed(self.config.seed)
        return z @ (torch.randn(len(z), width, generator=generator) / math.sqrt(width)).double()

    def contrastive(self, x: Tensor, tasks: list[int], masks: list[list[int]]) -> Tensor:
        """-log of the softmax of cos(z, e) / tau at the example's own task, mean over the examples."""
        total = 0.0
        for i, task in enumerate(tasks):
            z = self.pool(x[i], masks[i], self.config.pooling)
            similarity = [torch.dot(z, e) / (z.norm() * e.norm()) / self.config.temperature for e in self.E]
            total = total - torch.log(torch.exp(similarity[task]) / sum(torch.exp(s) for s in similarity))
        return total / len(tasks)


@dataclass
class Batch:
    """What the maps of an `OracleMap` model are told of the batch."""

    tasks: list[int]
    source: list[list[int]]
    target: list[list[int]]


class OracleMap(nn.Module):
    """A frozen linear map plus the oracle's update; it keeps its contrastive loss."""

    def __init__(self, base: nn.Module, oracle: Oracle, name: str, batch: Batch) -> None:
        super().__init__()
        self.base, self.oracle, self.batch = base, oracle, batch
        self.weight = base.weight
        self.in_decoder = bool(re.search(r"(^|\.)decoder\.", name)) and not re.search(r"EncDecAttention\.[kv]$", name)
        self.contrasts = oracle.config.contrastive_maps == "all" or name.startswith("encoder.")

    def forward(self, x: Tensor) -> Tensor:
        masks = self.batch.target if self.in_decoder else self.batch.source
        self.term = self.oracle.contrastive(x, self.batch.tasks, masks) if self.contrasts else None
        return self.base(x) + self.oracle.update(x, self.batch.tasks, masks, self.in_decoder)


def oracle_of(model: PeftModel, base: nn.Module, batch: Batch) -> dict[str, OracleMap]:
    """Put oracles with `model`'s parameters into `base`, an untouched copy of its base model; return them by name."""
    maps = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MoreLinear):
            parent, _, child = name.rpartition(".")
            maps[name] = OracleMap(base.get_submodule(name), Oracle(layer), name, batch)
            setattr(base.get_submodule(parent), child, maps[name])
    return maps


def tiny(kind: str, layers: int = 2) -> nn.Module:
    """A random model in float32: `llama`, `gpt2` (Conv1D maps) or `t5`."""
    torch.manual_seed(1)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    spread = {"initializer_range": 0.3}
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**common, **sizes, **spread, max_position_embeddings=64)).eval()
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64}
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, **spread, **dropouts)).eval()
    sizes = {
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 8,
        "num_layers": layers,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    start = {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**common, **sizes, **start)).eval()


def adapted(kind: str, base: nn.Module | None = None, trained: bool = True, **switches: object) -> PeftModel:
    """`tiny(kind)` with a MoRE adapter (r=4, three tasks); `trained` gives it the random weights of a trained one."""
    settings = {"r": 4, "lora_alpha": 8, "num_tasks": 3, "task_type": "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"}
    model = get_peft_model(tiny(kind) if base is None else base, MoreConfig(**{**settings, **switches}))
    if trained:
        scramble(model)
    return model.eval()


def scramble(model: nn.Module, seed: int = 3) -> None:
    """Random adapter weights such that tasks have different ranks; the table follows, except where it is frozen."""
    layers = [m for m in model.modules() if isinstance(m, MoreLinear)]
    for layer in layers:
        for name in layer.configs:
            layer.ranks(name)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".more_" in name:
            scale = 0.3 if "more_A" in name or "more_B" in name else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    for layer in layers:
        layer.stale = {name: config.gate != "frozen" for name, config in layer.configs.items()}


def prompts(kind: str = "llama", seed: int = 4) -> dict[str, Tensor]:
    """Four examples of three tasks, with padding on the right and labels at the answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([7, 5, 6, 7]).unsqueeze(1)).long()
    if kind == "t5":
        labels = torch.randint(3, VOCABULARY, (4, 3), generator=generator)
        labels[1, 2] = labels[2, 1:] = -100
    else:
        labels = ids.masked_fill((torch.arange(7) < 4) | (mask == 0), -100)
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_ids": torch.tensor([2, 0, 2, 1])}
