"""MixLoRA: every FFN becomes a mixture of experts, each the FFN with LoRAs of its own; attention gets one LoRA per map.

    p    = softmax(W_r h)                                     (n,) in float32, for every token h
    E_e  = (W_down + s B A)_e ( act((W_gate + s B A)_e h) * (W_up + s B A)_e h )          s = alpha / r
    y    = sum over the k highest p of  p_e / (their sum) * E_e(h)          or by another router: `mixlora_router`
    loss = balance * n * sum_e f_e P_e

f_e counts how often a token uses expert e, and P_e is the mean of p_e; both are over the real tokens of all layers
together. The experts are mixed after the non-linearity; an FFN without a gate leaves that factor out.

Source: "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts" (arXiv 2404.15159) and
the code of MoE-PEFT, whose defaults these are: n = 8, k = 2, r = 16, alpha = 32, balance 0.001, W_r from N(0, 0.02^2).
The MoRE paper's comparison has r = 8, wi and wo, and no LoRA in the attention: `attention=False`. Deviations: the
frozen maps before the non-linearity run once for all experts; which experts a token uses is a mask and not a choice of
modules, so that every rank runs the same ones, without a host synchronisation; dropout is drawn once for all experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.context import SOURCE, TARGET, TaskContext
from more_ds.tuners.low_rank import LowRank, LowRankConfig
from more_ds.tuners.mixlora_router import Routes, route
from more_ds.tuners.update import UpdateLayer
from more_ds.tuners.update_model import UpdateModel, register

FFN_PARTS = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("wi_0", "wi_1", "wo", "act"),
    (None, "wi", "wo", "act"),
    (None, "c_fc", "c_proj", "act"),
)
"""How models name an FFN's gate, first and second map, and its activation: LLaMA's like, T5 v1.1, T5, GPT-2."""
FFN_AND_ATTENTION = {
    "t5": (["DenseReluDense"], ["q", "k", "v", "o"]),
    "gpt2": (["mlp"], ["c_attn", "attn.c_proj"]),
}
FFN_AND_ATTENTION["mt5"] = FFN_AND_ATTENTION["t5"]
USUAL = (["mlp"], ["q_proj", "k_proj", "v_proj", "o_proj"])
"""Names of the FFN, and of the attention's maps, in LLaMA and its like."""


class Ffn(NamedTuple):
    """The parts of a frozen FFN: y = after(down(before(act(gate h) * up h))), or act(up h) without a gate."""

    gate: Any
    up: Any
    down: Any
    act: Any
    before: Any
    after: Any


def ffn_of(module: nn.Module) -> Ffn | None:
    """The parts of a module, or None if it is no FFN that is known here."""
    for gate, up, down, act in FFN_PARTS:
        if all(name is None or hasattr(module, name) for name in (gate, up, down, act)):
            dropout = getattr(module, "dropout", nn.Identity())
            drops = (nn.Identity(), dropout) if up == "c_fc" else (dropout, nn.Identity())
            named = [None if name is None else getattr(module, name) for name in (gate, up, down, act)]
            return Ffn(*named, *drops)
    return None


class Experts(nn.Module):
    """The router, (n, d), and the LoRAs of all experts side by side, by map: A is (n * r, in), B (out, n * r)."""

    def __init__(self, config: MixLoraConfig, sizes: dict[str, tuple[int, int]]) -> None:
        """Make the parameters for maps of (in, out) `sizes` by name."""
        super().__init__()
        self.config, self.sizes = config, sizes
        self.router = nn.Parameter(torch.empty(config.experts, sizes["up"][0]))
        for name, (width, out) in sizes.items():
            self.register_parameter(f"{name}_A", nn.Parameter(torch.empty(config.experts * config.r, width)))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.empty(out, config.experts * config.r)))
        self.dropout = nn.Dropout(config.lora_dropout)
        if not self.router.is_meta:
            self.reset()

    def reset(self) -> None:
        """The router from N(0, 0.02^2), a switch's from N(0, 1); A Kaiming-uniform (a = sqrt 5), B zero."""
        nn.init.normal_(self.router, std=1.0 if self.config.router == "switch" else 0.02)
        for name in self.sizes:
            nn.init.kaiming_uniform_(getattr(self, f"{name}_A"), a=math.sqrt(5))
            nn.init.zeros_(getattr(self, f"{name}_B"))

    def forward(self, h: Tensor, ffn: Ffn, real: Tensor) -> tuple[Tensor, Routes]:
        """Run the mixture on (batch, ..., d); `real`, (batch, ..., 1), says which tokens are no padding.

        Returns:
            y, (batch, ..., d), and how the tokens were routed.
        """
        routes = route(h, self.router, self.config, self.training, real)
        weights = routes.weights
        # One slot for each expert of a token, before the batch: the frozen map after the non-linearity runs once.
        masks = F.one_hot(routes.experts.movedim(-1, 0), self.config.experts)
        up = ffn.up(h) + self._delta("up", h, masks)
        hidden = ffn.act(up) if ffn.gate is None else ffn.act(ffn.gate(h) + self._delta("gate", h, masks)) * up
        flat = ffn.before(hidden).flatten(0, 1)
        weight = getattr(ffn.down, "weight", flat)
        down = ffn.down(flat.to(weight.dtype) if weight.is_floating_point() else flat).to(hidden.dtype)
        slots = down.view(*hidden.shape[:-1], -1) + self._delta("down", ffn.before(hidden), masks)
        mixed = (slots * weights.movedim(-1, 0).unsqueeze(-1).to(slots.dtype)).sum(0)
        return ffn.after(mixed).to(h.dtype), routes

    def _delta(self, name: str, x: Tensor, masks: Tensor) -> Tensor:
        """The LoRAs' part of a map: x is (batch, ..., in) or has slots, and masks are (slots, batch, ..., n)."""
        a, b = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
        hidden = F.linear(self.dropout(x.to(a.dtype)), a)
        mask = masks.repeat_interleave(self.config.r, dim=-1).to(hidden.dtype)
        return F.linear(hidden * mask * (self.config.lora_alpha / self.config.r), b).to(x.dtype)


class MixLoraFFN(UpdateLayer):
    """A frozen FFN with one mixture per adapter; the first active one runs."""

    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, context: TaskContext, key: str, role: str) -> None:
        """Wrap the FFN `key` of a model, which reads the sequence `role`."""
        super().__init__()
        self.base_layer, self.context, self.key, self.role = base_layer, context, key, role
        self.configs: dict[str, MixLoraConfig] = {}

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add an adapter."""
        ffn = ffn_of(self.get_base_layer())
        assert ffn is not None, "wrapped without a check"
        maps = {name: getattr(ffn, name) for name in ("gate", "up", "down") if getattr(ffn, name) is not None}
        sizes = {name: _sizes(module) for name, module in maps.items()}
        self.configs[adapter_name] = config
        self.update[adapter_name] = Experts(config, sizes)
        device = next(chain(self.base_layer.parameters(), self.base_layer.buffers())).device  # GPTQ's are buffers
        self._move_adapter_to_device_of_base_layer(adapter_name, device=device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, ..., d) to the same."""
        active = [name for name in self.active_adapters if name in self.update]
        ffn = ffn_of(self.base_layer)
        if self.disable_adapters or not active or ffn is None:
            return self.base_layer(h, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"the mixtures {', '.join(active)} cannot run at once; activate one with set_adapter")
        real = self.context.real_tokens(self.role, h.shape[:-1], h.device)
        y, routes = self.update[active[0]](h, ffn, real)
        if self.training:
            self.context.record(self.key, active[0], *_use(routes, real.to(routes.p.dtype)))
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("mixlora chooses experts by token, so it cannot be merged; use the adapter as it is")

    def unmerge(self) -> None:
        """Nothing, as nothing is merged."""


def _use(routes: Routes, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How often each expert was used, the sum of its probabilities, each (n,), the sum of z, and the real tokens."""
    total = tuple(range(real.dim() - 1))
    z = (routes.z * real.squeeze(-1)).sum()
    return (routes.used * real).sum(total), (routes.p * real).sum(total), z, real.sum()


class AttentionLora(LowRank):
    """The plain LoRA of one of the attention's maps."""

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        return self.up(self.down(x))


def _sizes(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map, or of GPT-2's Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf


@dataclass
class MixLoraConfig(LowRankConfig):
    """Configuration of MixLoRA."""

    method = "mixlora"
    update_class = AttentionLora

    r: int = field(default=16, metadata={"help": "Rank of every LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of A, in training."})
    experts: int = field(default=8, metadata={"help": "Number n of experts in every FFN."})
    router: Literal["top_k", "dynamic", "switch"] = field(default="top_k", metadata={"help": "How tokens are routed."})
    top_k: int = field(default=2, metadata={"help": "Number k of experts that a token uses, with router=top_k."})
    top_p: float = field(default=0.8, metadata={"help": "What the experts' p sum to at most, with router=dynamic."})
    capacity: int = field(default=32, metadata={"help": "Tokens of a sequence for one expert, with router=switch."})
    jitter: float = field(default=0.01, metadata={"help": "Noise before the router in training, with router=switch."})
    z_loss: float = field(default=1e-3, metadata={"help": "Weight of the squared log of the sum, with router=switch."})
    balance: float = field(default=1e-3, metadata={"help": "Weight of the balance loss; 0: none."})
    attention: bool = field(default=True, metadata={"help": "Give the attention's maps a LoRA each."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("experts", "top_k", "capacity")
        if self.router not in ("top_k", "dynamic", "switch"):
            raise ValueError(f"MixLoraConfig.router is {self.router!r}; use one of top_k, dynamic, switch")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"MixLoraConfig.top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k > self.experts:
            raise ValueError(f"MixLoraConfig.top_k={self.top_k} is more than experts={self.experts}")


class MixLoraModel(UpdateModel):
    """A model adapted by MixLoRA; in training mode `outputs.loss` contains the balance loss."""

    prefix = "mixlora_"
    auxiliary_name = "balance"

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            ffn, attention = FFN_AND_ATTENTION.get(model_config.get("model_type"), USUAL)
            peft_config.target_modules = {*ffn, *(attention if peft_config.attention else ())}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MixLoraFFN):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer) or ffn_of(target) is None:
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        in_decoder = self._is_encoder_decoder() and "encoder" not in current_key.split(".")
        layer = MixLoraFFN(target, self.context, current_key, TARGET if in_decoder else SOURCE)
        self._put(layer, adapter_name, peft_config, parent, target_name, target)

    def _begin(
        self, task_ids: Tensor | None, prompt_mask: Tensor | None, inputs: dict[str, Any], decoding: bool = False
    ) -> None:
        # Balance is over all real tokens, and not over the prompt's alone.
        mask = inputs.get("attention_mask")
        whole = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        super()._begin(task_ids, prompt_mask if whole is None else whole, inputs, decoding)

    def _auxiliary(self) -> Tensor | None:
        total = None
        for name, layers in self.context.collect().items():
            used, p, z, tokens = (torch.stack(part).sum(0) for part in zip(*layers, strict=True))
            config = self.peft_config[name]
            tokens = tokens.clamp(min=1)
            loss = config.balance * config.experts * (used * p).sum() / tokens**2
            if config.router == "switch":
                loss = loss + config.z_loss * z / tokens
            if config.balance > 0 or config.router == "switch":
                total = loss if total is None else total + loss
        return total


register("mixlora", MixLoraConfig, MixLoraModel)
