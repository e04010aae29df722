"""X-LoRA: finished LoRAs stay as they are, and a classifier weighs them for every token.

    h   = last hidden state of the base model without LoRAs, in a pass of its own and without a gradient
    s   = softmax(C(h) / temperature)                        (batch, length, N), or (batch, length, maps, N) `layerwise`
    y   = W0 x + sum_i s_i (alpha_i / r_i) B_i A_i x          in every map that a LoRA has

C is linear (`depth` 1), or has hidden layers of `width` with ReLU and dropout between them. It is all that is trained.

Source: "X-LoRA: Mixture of Low-Rank Adapter Experts" (arXiv 2402.07148); options and their defaults are those of PEFT's
`XLoraConfig`, but for its top-k and its scale. PEFT 0.21.2 has the method, and it is not what runs here: it reads the
LoRAs under the names 0, 1, ... and activates them under those of `adapters` (KeyError where they differ); with the
names 0 and 1 it takes the `0` of `layers.0` for a LoRA's name and leaves the classifier out of the adapter's file;
beside every LoRA it saves all of the base model; GPT-2's maps are not found; and its hooks are gone when gradient
checkpointing computes a layer again. Deviations: the LoRAs are in the adapter's file, and the places they come from
may go.

Generation has no cache, as in PEFT: both passes read the whole text for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.numerics import at_least_float32
from more_ds.tuners.loras import Loras, LorasModel
from more_ds.tuners.update import SHARED, SharedLayer, UpdateConfig, UpdateLinear
from more_ds.tuners.update_model import register

INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""What the pass for the hidden states is given of the model's inputs."""


class Scaled(Loras):
    """The LoRAs of one map."""

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("xlora weighs its LoRAs for every token, so it cannot be merged; use the adapter as it is")


class Classifier(nn.Module):
    """Weights of the LoRAs from hidden states."""

    def __init__(self, config: XLoraConfig, width: int, maps: int) -> None:
        """Make it, with values, for hidden states of a width and a model with so many adapted maps."""
        super().__init__()
        self.config = config
        sizes = [width, *[config.width] * (config.depth - 1)]
        hidden = [
            module
            for inside, outside in pairwise(sizes)
            for module in (nn.Linear(inside, outside), nn.ReLU(), nn.Dropout(config.dropout))
        ]
        self.sets = maps if config.layerwise else 1
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], self.sets * len(config.ranks)))

    def forward(self, h: Tensor) -> Tensor:
        """(batch, length, width) to (batch, length, maps or 1, N) float32."""
        logits = self.layers(h.to(next(self.layers.parameters()).dtype)).unflatten(-1, (self.sets, -1))
        return torch.softmax(at_least_float32(logits) / self.config.temperature, dim=-1)


@dataclass
class XLoraConfig(UpdateConfig):
    """Configuration of X-LoRA."""

    method = "x_lora"
    update_class = Scaled

    loras: list[str] = field(default_factory=list, metadata={"help": "The LoRAs: names of the places they are from."})
    ranks: list[int] = field(default_factory=list, metadata={"help": "Highest rank of each."})
    layerwise: bool = field(default=False, metadata={"help": "Weights of their own in every map."})
    depth: int = field(default=1, metadata={"help": "Layers of the classifier."})
    width: int = field(default=2048, metadata={"help": "Of its hidden layers."})
    dropout: float = field(default=0.2, metadata={"help": "After its hidden layers, in training."})
    temperature: float = field(default=1.0, metadata={"help": "Of its softmax."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("depth", "width")
        if len(self.loras) != len(self.ranks) or min(self.ranks, default=1) < 1:
            raise ValueError(f"XLoraConfig has {len(self.loras)} loras and ranks={self.ranks}; each needs one above 0")
        self.above_zero("temperature")


class XLoraLinear(UpdateLinear):
    """A frozen map with LoRAs that are weighed for every token."""

    number = 0

    def _updated(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        scales: Tensor | None = self.context.shared.get(name)
        if scales is None:  # the pass for the hidden states
            return torch.zeros_like(output)
        own = scales[:, :, self.number if self.configs[name].layerwise else 0]
        loras: Scaled = self.update[name]
        return loras.weighed(self._cast_input_dtype(x, loras.A.dtype), own)


class XLoraModel(LorasModel):
    """A model with finished LoRAs and a classifier beside it."""

    prefix = "x_lora_"
    layer_class = XLoraLinear
    takes_cache = False  # a token's weights come from another pass over the text before it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: its layers, then the classifier."""
        if self._is_encoder_decoder():
            raise ValueError("X-LoRA weighs the tokens of one sequence, and this model has two; use MoLE")
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config, layers = self.peft_config[adapter_name], self._layers(adapter_name)
        for number, layer in enumerate(layers):
            layer.number = number
        if not hasattr(model, SHARED):
            setattr(model, SHARED, SharedLayer())
            getattr(model, SHARED)._active_adapter = adapter_name
            self.__dict__["_hook"] = model.register_forward_pre_hook(self._weigh, with_kwargs=True)
        shared: Any = getattr(model, SHARED)
        width = self.model.get_input_embeddings().embedding_dim  # type: ignore[union-attr,operator]
        shared.update[adapter_name] = Classifier(config, int(width), len(layers))
        device = next(model.parameters()).device
        if device.type != "meta":
            shared.to(device)
        shared.set_adapter(shared.active_adapters, inference_mode=config.inference_mode)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, without a cache."""
        return super().generate(*args, **{**kwargs, "use_cache": False})

    def _share(self, module: Any) -> Any:
        """Nothing yet: the weights need the base model's hidden states."""
        return None

    def _weigh(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model runs: run it without LoRAs, and weigh them by what it says of every token."""
        shared: Any = getattr(model, SHARED)
        names = [name for name in self.active_adapters if name in shared.update]
        if shared.disable_adapters or not names:
            return
        self.context.shared.update(dict.fromkeys(names))
        given = {**dict(zip(INPUTS[:1], args, strict=False)), **kwargs}
        with torch.no_grad():
            inner = getattr(model, model.base_model_prefix)
            hidden = inner(**{key: given[key] for key in INPUTS if given.get(key) is not None}, use_cache=False)[0]
        self.context.shared.update({name: shared.update[name](hidden) for name in names})

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_hook").remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)


register("x_lora", XLoraConfig, XLoraModel)
