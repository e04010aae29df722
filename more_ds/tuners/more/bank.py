"""All maps of one adapter together: their gates in one step, the maps that read one tensor in one function.

`MoreLinear` alone is the method to the letter, map by map. With a bank the same parameters are used in another order
of computation, in which what MoRE adds to a plain LoRA is a number of operations that hardly grows with the depth, and
nothing asks the device for a value. A bank reads the maps' parameters outside of the modules that own them, so under
ZeRO-3 they must be whole on every rank; where they are not, and for the switches that it does not know, the maps work
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from more_ds.numerics import at_least_float32, autocasts, without_autocast
from more_ds.tuners.context import TaskContext, repeat_rows, same_tensor
from more_ds.tuners.more.config import HARD
from more_ds.tuners.more.functions import Choose, Contrast, GatedProduct
from more_ds.tuners.more.groups import Group, Part, finish, grouped
from more_ds.tuners.more.products import TORCH, Products, triton_products

if TYPE_CHECKING:
    from more_ds.tuners.more.layer import MoreLinear


class Bank:
    """The maps of one adapter, in groups that read one tensor."""

    def __init__(self, layers: Sequence[MoreLinear], name: str, context: TaskContext) -> None:
        """Group the layers that have the adapter `name`; `context` is their model's."""
        self.layers, self.name, self.context = list(layers), name, context
        self.config = self.layers[0].configs[name]
        self.groups = [Group(maps, name, context) for maps in grouped(self.layers)]
        self.alone = {layer.key: Group([layer], name, context) for group in self.groups for layer in group.maps[1:]}
        self.place = {layer.key: (g, i) for g, group in enumerate(self.groups) for i, layer in enumerate(group.maps)}
        widths = [self.config.task_dim or group.maps[0].in_features for group in self.groups]
        self.classes = [
            GateClass([g for g, own in enumerate(widths) if own == width], self.groups, width)
            for width in dict.fromkeys(widths)
        ]
        self.is_together = len({layer.more_A[name].weight.device for layer in self.layers}) == 1
        self._tables: tuple[Any, list[Tensor], Any] | None = None

    def serves(self, training: bool) -> bool:
        """Whether the maps can work together: the switches are the paper's, and all parameters are here, whole."""
        config = self.config
        knows = config.gate in (*HARD, "frozen", "table") and config.gate_input == "task"
        if training:  # a task that was added has an embedding of its own
            knows = knows and len(config.table_sizes) == 1 and self.layers[0].alone[self.name] is None
        return knows and self.is_together and self._are_whole()

    def begin(self, rows: Tensor, training: bool, fused: bool) -> Step:
        """Gate all maps for a batch.

        Args:
            rows: (batch,) or (1,) tasks.
            training: whether the gates are asked, and trained; else the table of ranks decides.
            fused: use functions with hand-written gradients.
        """
        config, first = self.config, self.layers[0].more_A[self.name].weight
        asks = training and config.gate in HARD
        contrasts = training and any(group.contrasts for group in self.groups)
        banks = [own.stacked(self.name, asks, asks or contrasts) for own in self.classes]
        weights: list[Tensor] = [rows] * len(self.groups)
        tables = None if asks else self._values(rows.device)
        for i, own in enumerate(self.classes):
            values = self._chosen(own, banks[i], rows) if tables is None else tables[i].index_select(0, rows)
            sizes = [len(self.groups[g].maps) * config.r for g in own.groups]
            for g, part in zip(own.groups, values.split(sizes, dim=1), strict=True):
                weights[g] = part
        if asks:
            for layer in self.layers:  # the optimizer is going to move the gates
                layer.stale[self.name] = True
        products = None
        if fused and not hasattr(first, "ds_id") and not autocasts(first):
            products = triton_products(first.device, first.dtype) if config.backend == "triton" else TORCH
        return Step(self, rows, weights, [bank[2] for bank in banks] if contrasts else None, products)

    def _chosen(self, own: GateClass, stacked: Sequence[Any], rows: Tensor) -> Tensor:
        def again() -> list[Tensor]:
            return [at_least_float32(part) for part in own.stacked(self.name, True, True)]

        weight, bias, embeddings = map(at_least_float32, stacked)
        table = self.layers[0]._table(self.name, weight)
        is_for_all = self.config.gate == "ste_all"
        made_again = None if torch.compiler.is_compiling() else again  # a compiled graph decides that by itself
        with without_autocast(weight):
            return Choose.apply(weight, bias, embeddings, rows, table, is_for_all, made_again)

    def _values(self, device: torch.device) -> list[Tensor]:
        """What the table of ranks multiplies the components by, of each class (tasks, maps * r), made once."""
        chosen = [[layer.ranks(self.name) for layer in own.maps] for own in self.classes]
        version = (device, [(id(ranks), ranks._version) for own in chosen for ranks in own])
        if self._tables is None or self._tables[0] != version:
            table = self.layers[0]._table(self.name, self.layers[0].more_A[self.name].weight)
            values = [table[torch.stack(own, dim=1).to(device) - 1].flatten(1) for own in chosen]
            self._tables = (version, values, chosen)  # which keeps the buffers, and so their ids
        return self._tables[1]

    def _are_whole(self) -> bool:
        """Whether every rank has all parameters; what ZeRO-3 is to keep whole is fetched before its first use."""
        if not hasattr(self.layers[0].more_A[self.name].weight, "ds_id"):
            return True
        own = [p for layer in self.layers for part in layer.parts(self.name) for p in part.parameters()]
        if not all(getattr(p, "ds_persist", False) for p in own):
            return False
        away = [p for p in own if p.ds_status.name != "AVAILABLE"]  # type: ignore[attr-defined]
        if away:
            away[0].all_gather(away)  # type: ignore[attr-defined]
        return True


class GateClass:
    """The groups of a bank whose task embeddings have one width."""

    def __init__(self, numbers: list[int], groups: Sequence[Group], width: int) -> None:
        """Take the groups with these numbers."""
        self.groups, self.width = numbers, width
        self.maps = [layer for g in numbers for layer in groups[g].maps]
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def stacked(self, name: str, gates: bool, embeddings: bool) -> list[Any]:
        """The gates' weights (maps, r, h), biases (maps, r) and the embeddings (maps, tasks, h); None if not asked."""
        weights = [m.more_gate[name].weight for m in self.maps] if gates else []
        biases = [m.more_gate[name].bias for m in self.maps] if gates else []
        tables = [m.more_task[name].weight for m in self.maps] if embeddings else []
        return [torch.stack(part) if part else None for part in (weights, biases, tables)]

    def index(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """The numbers as a tensor, which is sent to the device once."""
        key = tuple(numbers)
        if key not in self._indices or self._indices[key].device != device:
            with torch.inference_mode(False):  # it outlives this pass, and may meet one that trains
                self._indices[key] = torch.tensor(key, device=device)
        return self._indices[key]


class Step:
    """One forward pass of a bank: what the maps multiply by, and what they have pooled."""

    def __init__(
        self,
        bank: Bank,
        rows: Tensor,
        weights: list[Tensor],
        embeddings: list[Tensor] | None,
        products: Products | None,
    ) -> None:
        """Start a pass; see `Bank.begin`."""
        self.bank, self.rows, self.weights, self.embeddings, self.products = bank, rows, weights, embeddings, products
        self._pooled: dict[str, Tensor] = {}
        self._waiting: dict[int, tuple[Tensor, list[Part]]] = {}
        self._product: GatedProduct | None = None

    def product(self, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up, of which the map that reads it next keeps the factors alone."""
        self._product = GatedProduct(act, gate, up)
        return self._product.value

    def run(self, layer: MoreLinear, x: Tensor) -> Tensor:
        """One map, with the others of its group when it is the first of them."""
        number, place = self.bank.place[layer.key]
        group = self.bank.groups[number]
        if place == 0:
            parts = self._run(group, x, self.weights[number])
            if len(parts) > 1:
                self._waiting[number] = (x, parts)
            return finish(layer, x, parts[0])
        read, parts = self._waiting.get(number, (None, []))
        if place == len(group.maps) - 1:
            self._waiting.pop(number, None)
        if same_tensor(read, x):
            return finish(layer, x, parts[place])
        # A model of which the names promised too much: this map reads something else.
        r = self.bank.config.r
        v = self.weights[number][:, place * r : (place + 1) * r]
        return finish(layer, x, self._run(self.bank.alone[layer.key], x, v)[0])

    def _run(self, group: Group, x: Tensor, v: Tensor) -> list[Part]:
        pools = self.embeddings is not None and group.contrasts
        product, self._product = self._product, None
        if product is not None and product.value is not x:
            product = None
        parts, pooled = group.run(x, v, pools, self.products, product)
        if pooled is not None and self.bank.context.is_recording:
            self._pooled.update((layer.key, pooled) for layer in group.maps)
        return parts

    @property
    def num_compared(self) -> int:
        """Number of maps that the contrastive loss is a mean over."""
        return len(self._pooled)

    def contrastive_loss(self) -> Tensor | None:
        """lambda times the mean of the contrastive loss over the maps that were run; None if there is none."""
        self._waiting.clear()
        if self.embeddings is None or not self._pooled:
            return None
        bank, config = self.bank, self.bank.config
        terms = []
        for own, embeddings in zip(bank.classes, self.embeddings, strict=True):
            pooled = [self._pooled.get(layer.key) for layer in own.maps]
            # Maps that see flattened tokens have another batch: each token.
            for size in dict.fromkeys(z.shape[0] for z in pooled if z is not None):
                maps = [i for i, z in enumerate(pooled) if z is not None and z.shape[0] == size]
                share = config.contrastive_weight * len(maps) / len(self._pooled)
                terms.append(self._contrast(own, maps, [pooled[i] for i in maps], embeddings) * share)
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _contrast(self, own: GateClass, maps: Sequence[int], pooled: Sequence[Any], embeddings: Tensor) -> Tensor:
        """The mean over the maps with these numbers in a class, with what each has pooled."""
        if len(maps) < len(own.maps):
            embeddings = embeddings.index_select(0, own.index(maps, embeddings.device))
        inputs = {id(z): z for z in pooled}
        place = {key: i for i, key in enumerate(inputs)}
        z = self._projected([at_least_float32(z) for z in inputs.values()], own)
        owners = own.index([place[id(z)] for z in pooled], embeddings.device)
        rows = repeat_rows(self.rows, z.shape[1])
        with without_autocast(z):
            loss: Tensor = Contrast.apply(z, owners, at_least_float32(embeddings), rows, self.bank.config.temperature)
        return loss

    def _projected(self, pooled: Sequence[Tensor], own: GateClass) -> Tensor:
        """(inputs, batch, h) of pooled inputs, each of its own width."""
        by_width: dict[int, list[int]] = {}
        for i, one in enumerate(pooled):
            by_width.setdefault(one.shape[-1], []).append(i)
        project, seed = self.bank.context.project, self.bank.config.seed
        parts = [project(torch.stack([pooled[i] for i in at]), own.width, seed) for at in by_width.values()]
        if len(parts) == 1:
            return parts[0]
        order = [i for at in by_width.values() for i in at]
        return torch.cat(parts).index_select(0, own.index([order.index(i) for i in range(len(order))], parts[0].device))
