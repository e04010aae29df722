"""Adapters of Houlsby et al.: a bottleneck after the attention and after the FFN of every layer.

    y = o + U f(D o + b_d) + b_u                 o: what the sublayer's output projection returns, before the residual

Source: "Parameter-Efficient Transfer Learning for NLP" (ICML 2019), with the settings of the multi-task recipes of
HyperFormer and ATTEMPT: the bottleneck is the width divided by 32, f is GELU (tanh), weights start from N(0, 0.01^2),
biases at zero. Cross-attention gets an adapter if it is named in `target_modules`. Deviations: layer norms stay frozen
(name them in `modules_to_save` to train them); in T5 the sublayer's dropout comes after the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.update import Update, UpdateConfig
from more_ds.tuners.update_model import UpdateModel, register

OUTPUT_PROJECTIONS = {
    "t5": r".*(SelfAttention\.o|DenseReluDense\.wo)",
    "gpt2": ["c_proj"],
    "opt": ["out_proj", "fc2"],
    "bart": r".*(self_attn\.out_proj|fc2)",
    "falcon": ["dense", "dense_4h_to_h"],
    "gpt_neox": ["dense", "dense_4h_to_h"],
    "phi": ["dense", "fc2"],
}
OUTPUT_PROJECTIONS["mt5"] = OUTPUT_PROJECTIONS["t5"]
"""Type of a model -> the maps that end its sublayers."""
USUAL = ["o_proj", "down_proj"]
"""Those of LLaMA, Mistral, Qwen, Gemma, Phi-3 and their like."""


class Bottleneck(Update):
    """One sublayer: D, (bottleneck, out), U, (out, bottleneck), and their biases."""

    def __init__(self, config: HoulsbyConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        width = max(1, out_features // config.reduction)
        self.down = nn.Parameter(torch.empty(width, out_features))
        self.down_bias = nn.Parameter(torch.empty(width))
        self.up = nn.Parameter(torch.empty(out_features, width))
        self.up_bias = nn.Parameter(torch.empty(out_features))

    def reset(self) -> None:
        """D and U from N(0, 0.01^2), biases zero: nearly the identity."""
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=0.01)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        hidden = F.gelu(F.linear(output, self.down, self.down_bias), approximate="tanh")
        return F.linear(hidden, self.up, self.up_bias)


@dataclass
class HoulsbyConfig(UpdateConfig):
    """Configuration of Houlsby adapters."""

    method = "houlsby"
    update_class = Bottleneck

    reduction: int = field(default=32, metadata={"help": "The bottleneck is the width divided by this."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("reduction")


class HoulsbyModel(UpdateModel):
    """A model with Houlsby adapters."""

    prefix = "houlsby_"

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            found = OUTPUT_PROJECTIONS.get(model_config.get("model_type"), USUAL)
            peft_config.target_modules = set(found) if isinstance(found, list) else found
        return peft_config


register("houlsby", HoulsbyConfig, HoulsbyModel)
