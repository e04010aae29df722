"""BitFit: every linear map gets a trained bias, and nothing else changes.

    y = W0 x + b0 + b                                                              b starts at zero

Source: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models" (ACL 2022). T5 and
LLaMA have no biases, so they are added, as in the code of ATTEMPT (EMNLP 2022); where there is one, training b is
training it. Deviation: the biases of layer norms stay as they are, and so does the output layer's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.numerics import at_least_float32
from more_ds.tuners.base import refuse_packed
from more_ds.tuners.update import Update, UpdateConfig, UpdateLinear
from more_ds.tuners.update_model import UpdateModel, register


class BitFit(Update):
    """One map: the bias."""

    def __init__(self, config: BitFitConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.bias = nn.Parameter(torch.empty(out_features))

    def reset(self) -> None:
        """Zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        return self.bias.expand(output.shape)


class BitFitLinear(UpdateLinear):
    """A linear map whose bias is merged as a bias."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the sum of the biases into the base map, which may have had none."""
        base: Any = self.get_base_layer()
        refuse_packed(base, self.quantization_backend)
        for name in adapter_names or self.active_adapters:
            if name in self.update and name not in self.merged_adapters:
                self._memory.append(base.bias)
                total = at_least_float32(self.update[name].bias)
                if base.bias is not None:
                    total = total + at_least_float32(base.bias)
                if safe_merge and not torch.isfinite(total).all():
                    raise ValueError("the merged bias is not finite; the adapter seems to be broken")
                base.bias = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base map's bias back, to the bit."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            base.bias = self._memory.pop()
        self.context.merged_task = None


@dataclass
class BitFitConfig(UpdateConfig):
    """Configuration of BitFit."""

    method = "bitfit"
    update_class = BitFit

    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names, a regular expression, or `all-linear`."}
    )


class BitFitModel(UpdateModel):
    """A model adapted by BitFit."""

    prefix = "bitfit_"
    layer_class = BitFitLinear


register("bitfit", BitFitConfig, BitFitModel)
