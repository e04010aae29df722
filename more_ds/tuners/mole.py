"""MoLE: finished LoRAs stay as they are, and gates learn how much each of them says in every part of the model.

    z   = mean over the prompt's real tokens of what the unit's first map reads, divided by its length     (d,) float32
    g   = softmax(W_g z / tau)                                                          (N,) for every unit and example
    y   = W0 x + sum_i g_i (alpha_i / r_i) B_i A_i x                                    in every map of the unit
    loss = balance * -sum_i log(mean over units and examples of g_i)                    at least balance * N log N

A unit is a block of the model (default), a layer (attention or FFN), a matrix, or the whole network; W_g, (N, d), and
the temperature tau > 0 are all that is trained: N d + 1 numbers a unit. `only` masks LoRAs out: the softmax
renormalises the weights of the others, without training. With one LoRA left the adapter is that LoRA, and merges.

Source: "Mixture of LoRA Experts" (arXiv 2404.13628), equations 4 to 9, with its balance loss of weight 0.5, and the
published code (text-to-image alone): the gate reads the unit's input divided by its length, and the outputs of the
LoRAs are mixed inside of every map, so that the block runs once and not N times. W_g's rows start from N(0, 1) at
length 0.01, nearly uniform. Deviations: the paper flattens a text of fixed length, here it is pooled over the prompt
(`pooling`: mean, first or last), so that texts may have any length and the answer is never looked at; a decoder beside
an encoder pools its first position, as its later ones are the answer; in generation the gates are those of the prompt;
tau is exp(log tau), and is trained, as in the paper and unlike in the code; so is the balance loss, which is over the
examples of a micro-batch.

The LoRAs are in the adapter's file, and in the memory of every rank: N (in + out) r values a map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32, without_autocast
from more_ds.tuners.context import SOURCE, TARGET, repeat_rows
from more_ds.tuners.loras import Loras, LorasModel
from more_ds.tuners.update import UpdateConfig, UpdateLinear
from more_ds.tuners.update_model import register

Level = Literal["block", "layer", "matrix", "network"]
BLOCK = re.compile(r".*?(?:^|\.)(?:layers|layer|blocks?|h|attentions)\.\d+(?=\.)")
"""A block's name at the front of a map's: LLaMA and its like, T5, GPT-2, and a UNet's transformers."""


def unit_of(key: str, level: Level) -> str:
    """The unit that a map belongs to, by its name in the model; a map outside of all blocks is one of its own."""
    if level == "network":
        return ""
    if level == "layer":
        return key.rpartition(".")[0]
    found = BLOCK.match(key) if level == "block" else None
    return found.group() if found else key


class Mixture(Loras):
    """The LoRAs of one map side by side, and its unit's gate if the map is the first of the unit.

    Attributes:
        gate: W_g, (N, in); None in the other maps.
        log_temperature: (1,) log tau; likewise.
    """

    gate: nn.Parameter | None
    log_temperature: nn.Parameter | None

    def __init__(self, config: MoleConfig, in_features: int, out_features: int) -> None:
        """Make room for the LoRAs."""
        super().__init__(config, in_features, out_features)
        self.register_parameter("gate", None)
        self.register_parameter("log_temperature", None)

    def lead(self) -> None:
        """Take the unit's gate."""
        gate = F.normalize(torch.randn(len(self.config.ranks), self.in_features), dim=1)
        self.gate = nn.Parameter(0.01 * gate)
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(self.config.temperature)))

    def forward(self, x: Tensor, pooled: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The update, and the weights of the LoRAs.

        Args:
            x: (batch, ..., in) what the map reads.
            pooled: (rows, in) the prompts, for the gate; None where there are weights.
            weights: (rows, N) the unit's; None where the gate is to make them.

        Returns:
            (batch, ..., out), and (rows, N) float32.
        """
        if weights is None:
            assert pooled is not None, "neither prompts nor weights"
            weights = self._weigh(pooled)
        rows = repeat_rows(weights, len(x))
        return self.weighed(x, rows.view(len(x), *[1] * (x.dim() - 2), -1)), weights

    def _weigh(self, pooled: Tensor) -> Tensor:
        assert self.gate is not None, "the map does not lead its unit"
        assert self.log_temperature is not None
        with without_autocast(pooled):
            z = F.normalize(at_least_float32(pooled), dim=-1)
            logits = z @ at_least_float32(self.gate).T / at_least_float32(self.log_temperature).exp()
            if self.config.only is not None:
                masked = torch.ones_like(logits, dtype=torch.bool)
                masked[:, self.config.only] = False
                logits = logits.masked_fill(masked, -torch.inf)
            return torch.softmax(logits, dim=-1)

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        used = self.config.used
        if len(used) > 1:
            raise ValueError(
                f"mole weighs its LoRAs for every example, so it cannot be merged; with one of them left it can: "
                f"use_loras([{used[0]}])"
            )
        own = self.owner == used[0]
        return at_least_float32(self.A[own]), at_least_float32(self.B[:, own])


@dataclass
class MoleConfig(UpdateConfig):
    """Configuration of MoLE."""

    method = "mole"
    update_class = Mixture
    gate_input: ClassVar[str] = "prompt"

    loras: list[str] = field(default_factory=list, metadata={"help": "The LoRAs: names of the places they are from."})
    ranks: list[int] = field(default_factory=list, metadata={"help": "Highest rank of each."})
    level: Level = field(default="block", metadata={"help": "What shares a gate: block, layer, matrix or network."})
    pooling: str = field(default="mean", metadata={"help": "Of the prompt, for the gate: mean, first or last."})
    temperature: float = field(default=1.0, metadata={"help": "tau at the start."})
    balance: float = field(default=0.5, metadata={"help": "Weight of the balance loss; 0: none."})
    only: list[int] | None = field(default=None, metadata={"help": "Numbers of the LoRAs in use; None: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("level", get_args(Level)), ("pooling", ("mean", "first", "last"))):
            if getattr(self, name) not in known:
                raise ValueError(f"MoleConfig.{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        if len(self.loras) != len(self.ranks) or min(self.ranks, default=1) < 1:
            raise ValueError(f"MoleConfig has {len(self.loras)} loras and ranks={self.ranks}; each needs one above 0")
        if self.temperature <= 0 or self.balance < 0:
            raise ValueError("MoleConfig.temperature must be above 0, and balance 0 or more")
        self.mask(self.only)

    @property
    def used(self) -> list[int]:
        """Numbers of the LoRAs in use."""
        return list(range(len(self.loras))) if self.only is None else self.only

    def mask(self, only: Sequence[int] | None) -> None:
        """Use some of the LoRAs, or all.

        Raises:
            ValueError: there are no such LoRAs.
        """
        if only is not None and (not only or not set(only) <= set(range(len(self.loras)))):
            raise ValueError(f"MoleConfig.only is {list(only)}; the LoRAs have the numbers 0 to {len(self.loras) - 1}")
        self.only = None if only is None else sorted(set(only))


class MoleLinear(UpdateLinear):
    """A frozen map with LoRAs that are mixed by the weights of its unit."""

    role = SOURCE

    def _updated(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        mixture, config = self.update[name], self.configs[name]
        unit = unit_of(self.key, config.level)
        known = self.context.shared.setdefault(name, {})
        pooled, weights = None, known.get(unit)
        if mixture.gate is not None:
            # Recomputed under checkpointing: what the first pass left must not be read again.
            weights = self.context.held(unit, name)
            if weights is None:
                pooled = self.context.pool(x, self.role, "first" if self.role == TARGET else config.pooling)
        update, known[unit] = mixture(self._cast_input_dtype(x, mixture.A.dtype), pooled, weights)
        if mixture.gate is not None:
            self.context.hold(unit, name, known[unit])
            if self.training:
                self.context.record(self.key, name, known[unit].mean(0))
        return update


class MoleModel(LorasModel):
    """A model with a mixture of finished LoRAs."""

    prefix = "mole_"
    layer_class = MoleLinear
    pools_prompts = True
    takes_cache = False  # the gates weigh by all of the prompt
    auxiliary_name = "balance"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: its layers, then a gate in the first map of every unit."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, units = self.peft_config[adapter_name], set()
        for layer in self._layers(adapter_name):
            in_decoder = self._is_encoder_decoder() and "encoder" not in layer.key.split(".")
            layer.role = TARGET if in_decoder else SOURCE
            unit = unit_of(layer.key, config.level)
            if unit not in units:
                units.add(unit)
                layer.update[adapter_name].lead()
                layer._move_adapter_to_device_of_base_layer(adapter_name)
                layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def use_loras(self, only: Sequence[int] | None, adapter_name: str = "default") -> None:
        """Use these LoRAs alone from now on, by their numbers, or all; the others' weights go to them.

        Raises:
            ValueError: there are no such LoRAs.
        """
        self.peft_config[adapter_name].mask(only)
        for layer in self._layers(adapter_name):
            layer.configs[adapter_name].mask(only)
            layer.update[adapter_name].config.mask(only)

    def _auxiliary(self) -> Tensor | None:
        total = None
        for name, units in self.context.collect().items():
            config = self.peft_config[name]
            if config.balance > 0:
                shares = torch.stack([weights for (weights,) in units]).mean(0)[config.used]
                loss = -config.balance * shares.log().sum()
                total = loss if total is None else total + loss
        return total


register("mole", MoleConfig, MoleModel)
