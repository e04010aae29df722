"""The MoRE tuner: adapts a model's linear maps and adds the contrastive loss to its loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.utils import _get_submodules
from torch import Tensor, nn

from more_ds.errors import suggest
from more_ds.losses import contrastive_loss
from more_ds.tuners.context import SOURCE, TARGET, repeat_rows
from more_ds.tuners.linear import is_linear
from more_ds.tuners.more.bank import Bank, Step
from more_ds.tuners.more.config import MoreConfig
from more_ds.tuners.more.feedforward import save_memory
from more_ds.tuners.more.gated import GatedMap
from more_ds.tuners.more.layer import MoreLinear
from more_ds.tuners.more.stacked import MoreExperts, StackedMap
from more_ds.tuners.routed import RoutedModel
from more_ds.tuners.stacked_weights import is_named, stacked_experts

CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""Names under which encoder-decoder models keep the attention whose keys and values read the encoder."""
KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


class MoreModel(RoutedModel):
    """A model whose linear maps, and stacked experts, carry a mixture of low-rank experts.

    In training mode `outputs.loss` is the base model's loss plus `contrastive_weight` times the contrastive loss.
    """

    prefix = "more_"
    tuner_layer_cls = GatedMap
    auxiliary_name = "contrastive"

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        if config.contrastive_maps == "encoder" and not self._is_encoder_decoder():
            raise ValueError("contrastive_maps='encoder' needs an encoder-decoder model; this one has no encoder")

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
        if isinstance(target, MoreLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if not is_linear(target):
            raise ValueError(f"target module {current_key} is a {type(target).__name__}; MoRE adapts linear maps only")
        layer = MoreLinear(target, self.context, _role(current_key, self._is_encoder_decoder()), current_key)
        self._put(layer, adapter_name, peft_config, parent, target_name, target)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = super()._check_target_module_exists(peft_config, key)
        # Under the name of a stacked weight there is a module once an adapter has it; it is no target of its own.
        return found and not isinstance(self.model.get_submodule(key), StackedMap)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the stacked weights that `target_parameters` names; returns their full names."""
        found: list[str] = []
        is_encoder_decoder = self._is_encoder_decoder()
        for experts in list(stacked_experts(model)):
            keys = [key for key in experts.keys if is_named(key, peft_config.target_parameters)]
            if not keys:
                continue
            parent, target, own_name = _get_submodules(model, experts.name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                is_new = not isinstance(target, MoreExperts)
                role = _role(keys[0], is_encoder_decoder)
                layer = MoreExperts(experts, self.context, role) if is_new else cast(MoreExperts, target)
                for key in keys:
                    layer.adapt(key.rpartition(".")[2], adapter_name, peft_config)
            if is_new:
                if adapter_name not in self.active_adapters:
                    layer.requires_grad_(False)
                self._replace_module(parent, own_name, layer, experts.module)
            found += keys
        return found

    def inject_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter, as in PEFT."""
        result = super().inject_adapter(*args, **kwargs)
        save_memory(self.model)
        self.context.banks.clear()
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as in PEFT."""
        super().delete_adapter(adapter_name)
        self.context.banks.clear()

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        super()._begin(*args, **kwargs)
        self.context.step = self._step()

    def _step(self) -> Step | None:
        """What all maps run with in this pass; None where each works alone."""
        names = [name for name in self.active_adapters if name in self.peft_config]
        if len(names) != 1 or self.peft_config[names[0]].backend == "reference":
            return None
        name, config = names[0], self.peft_config[names[0]]
        if name not in self.context.banks:
            linear = [layer for layer in self._layers(name) if isinstance(layer, MoreLinear)]
            self.context.banks[name] = Bank(linear, name, self.context) if linear else None
        bank: Bank | None = self.context.banks[name]
        if bank is None:
            return None
        first = bank.layers[0]
        if first.disable_adapters or first.merged or not bank.serves(first.training):
            return None
        rows = self.context.rows(config.num_tasks, first.more_A[name].weight.device)
        fused = config.backend != "eager" and not torch.compiler.is_compiling()
        return bank.begin(rows, first.training, fused)

    def _auxiliary(self) -> Tensor | None:
        step: Step | None = self.context.step
        recorded = self.context.collect()
        weighted = [self._contrast(self.peft_config[name], maps) for name, maps in recorded.items()]
        together = step.contrastive_loss() if step is not None else None
        if step is None or together is None:
            return torch.stack(weighted).sum() if weighted else None
        if not weighted:
            return together
        # One adapter: the maps of its bank, and those of stacked experts, which work alone.
        alone = sum(map(len, recorded.values()))
        return (together * step.num_compared + weighted[0] * alone) / (step.num_compared + alone)

    def _contrast(self, config: MoreConfig, maps: list[tuple[Tensor, ...]]) -> Tensor:
        """lambda times the mean of the contrastive loss over the maps; maps of one shape in one operation."""
        by_shape: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, ...]]] = {}
        for pooled, embeddings in maps:
            by_shape.setdefault((pooled.shape, embeddings.shape), []).append((pooled, embeddings))
        total = maps[0][0].new_zeros(())
        for alike in by_shape.values():
            z, embeddings = (torch.stack(part) for part in zip(*alike, strict=True))
            rows = repeat_rows(self.context.rows(config.num_tasks, z.device), z.shape[1])
            total = total + contrastive_loss(z, embeddings, rows, config.temperature) * len(alike)
        return config.contrastive_weight * total / len(maps)

    def add_task(self, name: str, init_from: str | int, adapter_name: str = "default") -> int:
        """Teach the adapter one more task, which starts as a copy of one that it knows.

        The embedding of task `init_from` is copied in every adapted map, and with it the gate's choice of rank, as the
        gate is one function of the embedding for all tasks. The outputs of the other tasks stay what they are, to the
        bit. To be called before an optimizer or a DeepSpeed engine is made.

        Args:
            name: of the task.
            init_from: name or number of a task.
            adapter_name: adapter to extend.

        Returns:
            The number of the task.

        Raises:
            ValueError: the name is taken, `init_from` is unknown, the adapter's tasks have no names, or its weights
                are not whole on this rank (ZeRO-3).
        """
        config = self.peft_config[adapter_name]
        known = config.task_names
        if known is None:
            raise ValueError("the adapter does not name its tasks; set task_names in its config, in order")
        if name in known:
            raise ValueError(f"the adapter knows task '{name}' already; it knows: {', '.join(known)}")
        source = init_from if isinstance(init_from, int) else known.index(init_from) if init_from in known else -1
        if not 0 <= source < config.num_tasks:
            raise ValueError(f"init_from is {init_from!r}{suggest(str(init_from), known)}")
        layers = self._layers(adapter_name)
        if any(p.numel() == 0 for layer in layers for p in layer.more_task[adapter_name].parameters()):
            raise ValueError("the task embeddings are partitioned by ZeRO-3; add the task before the engine is made")
        for layer in layers:
            layer.add_task(adapter_name, source)
        config.first_tasks = config.table_sizes[0]
        config.num_tasks, config.task_names = config.num_tasks + 1, [*known, name]
        return config.num_tasks - 1

    def train_task(self, name: str | None, adapter_name: str = "default") -> None:
        """Train the embedding of one added task alone; None: everything that the adapter trains.

        With the gate `ste` the outputs then change as far as the embedding moves the task to other ranks; with `soft`
        they change smoothly. To be called before an optimizer or a DeepSpeed engine is made.

        Raises:
            ValueError: the task was not added by `add_task`, or its embedding decides nothing (gate `frozen`, or a gate
                on the pooled input).
        """
        config = self.peft_config[adapter_name]
        task = None
        if name is not None:
            added = (config.task_names or [])[config.table_sizes[0] :]
            if name not in added:
                raise ValueError(f"'{name}' is no task that was added{suggest(name, added)}")
            if config.gate == "frozen" or config.gate_input == "pooled":
                raise ValueError(
                    f"with gate={config.gate} and gate_input={config.gate_input} a task embedding decides nothing; "
                    "train the whole adapter"
                )
            task = config.task_names.index(name)
        for layer in self._layers(adapter_name):
            layer.train_alone(adapter_name, task)

    def _layers(self, adapter_name: str) -> list[GatedMap]:
        return [m for m in self.model.modules() if isinstance(m, GatedMap) and adapter_name in m.more_A]

    def ranks(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The task-to-rank table: (tasks,) from 1 to r, by the name of the adapted map."""
        return {layer.key: layer.ranks(adapter_name).clone() for layer in self._layers(adapter_name)}


def _role(key: str, is_encoder_decoder: bool) -> str:
    """Which sequence a map reads: outside an encoder, all but the cross-attention's keys and values read the target."""
    parts = key.split(".")
    in_decoder = is_encoder_decoder and "encoder" not in parts
    reads_encoder = any(part in CROSS_ATTENTION for part in parts) and parts[-1] in KEYS_AND_VALUES
    return TARGET if in_decoder and not reads_encoder else SOURCE
