"""Random LoRAs for the tiny models, mixed by MoLE, and the same token by token."""

from __future__ import annotations

from typing import Any

import torch
from oracle import tiny
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from more_ds.tuners.mole import MoleConfig, unit_of

RANKS = [2, 3, 1]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wo"],
}  # fmt: skip
Factors = dict[str, tuple[Tensor, Tensor]]


def random_loras(model: PeftModel, ranks: list[int] = RANKS) -> list[Factors]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            layer.key: (
                torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5,
                torch.randn(layer.out_features, rank, generator=generator),
            )
            for layer in model.base_model._layers("default")
        }
        for rank in ranks
    ]


def mixed(kind: str = "llama", trained: bool = True, **options: Any) -> tuple[PeftModel, list[Factors]]:
    """A tiny model with three random LoRAs, whose gates are not uniform if they are `trained`."""
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    config = MoleConfig(
        loras=["a", "b", "c"], ranks=RANKS, target_modules=TARGETS[kind], task_type=task_type, **options
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny(kind), config)
    loras = random_loras(model)
    for i, factors in enumerate(loras):
        model.base_model.put(i, factors)
    if trained:
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=5.0 if name.endswith("gate") else 0.5)
    return model.eval(), loras


class OracleMap(nn.Module):
    """A frozen map plus LoRAs, example by example, with gates in a table that all maps share."""

    def __init__(self, base: nn.Module, unit: str, loras: list[Any], gates: Any, table: Any, mask: Tensor, only: Any):
        super().__init__()
        self.base, self.unit, self.loras, self.gates, self.table = base, unit, loras, gates, table
        self.mask, self.only = mask, only or range(len(loras))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for i in range(len(x)):
            if (self.unit, i) not in self.table:
                self.table[self.unit, i] = self.weigh(x[i], self.mask[i])
            weights = self.table[self.unit, i]
            rows.append(sum(weights[j] * (x[i] @ a.T @ b.T) for j, (a, b) in enumerate(self.loras)))
        return self.base(x) + torch.stack(rows)

    def weigh(self, x: Tensor, mask: Tensor) -> Tensor:
        gate, log_temperature = self.gates[self.unit]
        z = sum(row for row, real in zip(x, mask, strict=True) if real) / mask.sum()
        z = z / (z**2).sum().sqrt()
        powers = [torch.exp(gate[j] @ z / torch.exp(log_temperature[0])) for j in range(len(gate))]
        total = sum(powers[j] for j in self.only)
        return torch.stack([p / total if j in self.only else p * 0 for j, p in enumerate(powers)])


def oracle(model: PeftModel, loras: list[Factors], mask: Tensor) -> tuple[nn.Module, dict[str, Any], dict[Any, Tensor]]:
    """The base model with literal maps: it, the leaves of the gates by unit, and the weights after a pass."""
    base, config = tiny("llama").double(), model.active_peft_config
    gates: dict[str, Any] = {}
    table: dict[Any, Tensor] = {}
    for layer in model.base_model._layers("default"):
        update, unit = layer.update["default"], unit_of(layer.key, config.level)
        if update.gate is not None:
            gates[unit] = [p.detach().double().requires_grad_() for p in (update.gate, update.log_temperature)]
        own = [[t.double() for t in factors[layer.key]] for factors in loras]
        parent, _, child = layer.key.rpartition(".")
        wrapped = OracleMap(base.get_submodule(layer.key), unit, own, gates, table, mask, config.only)
        setattr(base.get_submodule(parent), child, wrapped)
    return base, gates, table
