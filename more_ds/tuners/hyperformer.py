"""HyperFormer and HyperFormer++: networks write the weights of adapters from the task, the layer and the place.

    I  = LN(W_2 relu(W_1 [e_task; e_layer; e_place]))                                       (64,)
    D, b_d, U, b_u, g, s = linear maps of I
    y  = o + g * norm(U f(D o + b_d) + b_u) + s          o: what the sublayer's output projection returns

f is GELU (tanh) and norm a layer norm without weights. With `plus_plus` (the default) one set of networks writes the
adapters after the attention and after the FFN; without, each place has a set, and e_place is left out. Encoder and
decoder have sets of their own, and cross-attention has no adapter.

Source: "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks" (ACL 2021) and its code:
embeddings of 64, a hidden layer of 128, bottleneck = width / 32, every linear map that writes from N(0, 0.01^2) with
bias zero, e_task from N(0, 1). Deviations: layer norms of the model stay frozen (name them in `modules_to_save`); in T5
the sublayer's dropout comes after the adapter. The weights are written once a batch, for the tasks that are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.houlsby import OUTPUT_PROJECTIONS, USUAL
from more_ds.tuners.linear import ATTENTION
from more_ds.tuners.update import TasksConfig, Update, UpdateConfig
from more_ds.tuners.update_model import UpdateModel, register

HIDDEN = 128


class Written(NamedTuple):
    """The weights of all adapters for the tasks of a batch.

    Attributes:
        places: by name of the adapted map, (tasks in the batch, numbers of one adapter).
        rows: (T,) which of these rows is each task's.
    """

    places: dict[str, Tensor]
    rows: Tensor


class Place(NamedTuple):
    """Where an adapter is: the set of networks that writes it, its layer among theirs, and 0 (attention) or 1 (FFN)."""

    networks: str
    layer: int
    kind: int


class Writer(nn.Module):
    """One set of networks: from embeddings of task, layer and place to the numbers of one adapter."""

    def __init__(self, config: HyperFormerConfig, layers: int, width: int, sizes: dict[str, int]) -> None:
        """Make the networks for `layers` layers; `sizes` are the lengths of what they write, by name."""
        super().__init__()
        dim = config.task_dim
        self.plus_plus, self.sizes = config.plus_plus, sizes
        self.layer = nn.Parameter(torch.randn(layers, dim))
        if config.plus_plus:
            self.kind = nn.Parameter(torch.randn(2, dim))
        self.mix = nn.Sequential(
            nn.Linear((3 if config.plus_plus else 2) * dim, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, dim),
            nn.LayerNorm(dim),
        )
        self.write = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, tasks: Tensor, layer: Sequence[int], kind: Sequence[int]) -> Tensor:
        """(tasks, h) embeddings, and the layer and kind of every adapter: (adapters, tasks, numbers)."""
        parts = [self.layer[list(layer)], *([self.kind[list(kind)]] if self.plus_plus else [])]
        where = torch.cat(parts, dim=-1).unsqueeze(1).expand(-1, len(tasks), -1)
        mixed = self.mix(torch.cat([tasks.unsqueeze(0).expand(len(layer), -1, -1), where], dim=-1))
        return torch.cat([self.write[name](mixed) for name in self.sizes], dim=-1)


class HyperNetworks(nn.Module):
    """The task embeddings and all sets of networks of a model."""

    def __init__(self, config: HyperFormerConfig, widths: dict[str, int]) -> None:
        """Make them for adapters after maps of output `widths` by name, which must be the same."""
        super().__init__()
        if len(set(widths.values())) != 1:
            raise ValueError(f"HyperFormer writes adapters of one width; the target modules have {widths}")
        self.width = next(iter(widths.values()))
        self.sizes = adapter_sizes(self.width, config.reduction)
        self.task = nn.Parameter(torch.randn(config.num_tasks, config.task_dim))
        self.places = {key: _place(key, config.plus_plus) for key in widths}
        layers = {place.networks: 0 for place in self.places.values()}
        for place in self.places.values():
            layers[place.networks] = max(layers[place.networks], place.layer + 1)
        self.networks = nn.ModuleDict({n: Writer(config, count, self.width, self.sizes) for n, count in layers.items()})

    def forward(self, tasks: Tensor | None) -> Written:
        """Write the adapters of the `tasks`, (batch,); of all tasks, if it is None."""
        number = torch.arange(len(self.task), device=self.task.device)
        # The meta device has no values to tell apart; a micro-batch is of one task.
        present = number if tasks is None else tasks[:1] if tasks.is_meta else tasks.unique()
        rows = torch.zeros_like(number).scatter_(0, present, torch.arange(len(present), device=number.device))
        places: dict[str, Tensor] = {}
        for name, writer in self.networks.items():
            keys = [key for key, place in self.places.items() if place.networks == name]
            chosen = [self.places[key] for key in keys]
            written = writer(self.task[present], [p.layer for p in chosen], [p.kind for p in chosen])
            places.update(zip(keys, written, strict=True))
        return Written(places, rows)


def adapter_sizes(width: int, reduction: int) -> dict[str, int]:
    """How many numbers each part of an adapter has."""
    bottleneck = max(1, width // reduction)
    sizes = {"down": bottleneck * width, "down_bias": bottleneck, "up": bottleneck * width, "up_bias": width}
    return {**sizes, "gain": width, "shift": width}


def _place(key: str, plus_plus: bool) -> Place:
    parts = key.split(".")
    block = "encoder" if "encoder" in parts else "decoder"
    kind = 0 if ATTENTION.search(key) else 1
    layer = next((int(part) for part in parts if part.isdecimal()), 0)
    return Place(block if plus_plus else f"{block}_{'attention' if kind == 0 else 'ffn'}", layer, kind)


class WrittenAdapter(Update):
    """An adapter without parameters of its own."""

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        sizes = adapter_sizes(self.out_features, self.config.reduction)
        rows = shared.places[self.key].index_select(0, shared.rows[tasks]).to(output.dtype)
        down, down_bias, up, up_bias, gain, shift = rows.split(list(sizes.values()), dim=-1)
        o = output.reshape(len(output), -1, self.out_features)
        hidden = torch.bmm(o, down.view(len(o), -1, self.out_features).mT) + down_bias.unsqueeze(1)
        hidden = torch.bmm(F.gelu(hidden, approximate="tanh"), up.view(len(o), self.out_features, -1).mT)
        normed = F.layer_norm(hidden + up_bias.unsqueeze(1), (self.out_features,))
        return (normed * gain.unsqueeze(1) + shift.unsqueeze(1)).view(output.shape)

    def reset(self) -> None:
        """Nothing: the networks write it."""


@dataclass
class HyperFormerConfig(TasksConfig, UpdateConfig):
    """Configuration of HyperFormer."""

    method = "hyperformer"
    update_class = WrittenAdapter

    plus_plus: bool = field(default=True, metadata={"help": "One set of networks for both places of a layer."})
    task_dim: int = field(default=64, metadata={"help": "Width of the embeddings."})
    reduction: int = field(default=32, metadata={"help": "The bottleneck is the width divided by this."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("task_dim", "reduction")

    def shared_module(self, widths: dict[str, int]) -> nn.Module:
        return HyperNetworks(self, widths)


class HyperFormerModel(UpdateModel):
    """A model whose adapters are written by networks."""

    prefix = "hyperformer_"
    routes_by_task = True

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            found = OUTPUT_PROJECTIONS.get(model_config.get("model_type"), USUAL)
            peft_config.target_modules = set(found) if isinstance(found, list) else found
        return peft_config

    def _share(self, module: Any) -> Any:
        tasks = self.context.task_ids
        if tasks is None and self.context.default_task is not None:
            tasks = torch.tensor([self.context.default_task])
        return module(None if tasks is None else tasks.to(module.task.device))


register("hyperformer", HyperFormerConfig, HyperFormerModel)
