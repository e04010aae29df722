"""The MoRE tuner: adapts a model's linear maps and adds the contrastive loss to its loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from more_ds.errors import suggest
from more_ds.losses import IGNORED, contrastive_loss
from more_ds.tuners.base import TASK_IDS
from more_ds.tuners.context import SOURCE, TARGET, TaskContext, repeat_rows
from more_ds.tuners.more.config import MoreConfig
from more_ds.tuners.more.layer import MoreLinear

CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""Names under which encoder-decoder models keep the attention whose keys and values read the encoder."""
KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


class MoreModel(BaseTuner):
    """A model whose linear maps carry a mixture of low-rank experts.

    `forward` and `generate` take `task_ids`, (batch,), beside the base model's own arguments. In training mode
    `outputs.loss` is the base model's loss plus `contrastive_weight` times the contrastive loss; `losses` holds the
    parts: `lm` (if labels were given) and `contrastive`, weighted. Without labels, add `auxiliary_loss` yourself.
    """

    prefix = "more_"
    tuner_layer_cls = MoreLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    routes_by_task = True
    peft_config: dict[str, Any]

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.__dict__.setdefault("context", TaskContext())
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
        if not isinstance(target, (nn.Linear, Conv1D)) and not hasattr(target, "in_features"):
            raise ValueError(f"target module {current_key} is a {type(target).__name__}; MoRE adapts linear maps only")
        layer = MoreLinear(target, self.context, _role(current_key, self._is_encoder_decoder()), current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def forward(
        self, *args: Any, task_ids: Tensor | None = None, prompt_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the base model for a batch of tasks.

        Args:
            args: the base model's.
            task_ids: (batch,) task of every example; may be left out after `set_task`, or with one task.
            prompt_mask: (batch, length) 1 at the tokens that are pooled; by default those which the attention mask
                shows and which are no label, or all that it shows where labels are everywhere.
            kwargs: the base model's.
        """
        self._begin(kwargs.pop(TASK_IDS, task_ids), prompt_mask, _named(args, kwargs))
        outputs = self.model(*args, **kwargs)
        weighted = [self._contrast(self.peft_config[name], maps) for name, maps in self.context.collect().items()]
        if weighted:
            self.losses["contrastive"] = torch.stack(weighted).sum()
            if kwargs.get("labels") is not None:
                outputs = self._add_to_loss(outputs, kwargs)
        return outputs

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

    @property
    def losses(self) -> dict[str, Tensor]:
        """The parts of the last training loss, scalars."""
        return self.context.losses

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """The weighted contrastive loss of the last forward pass (scalar), or None outside training."""
        return self.losses.get("contrastive")

    def generate(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate` for a batch of tasks, (batch,) `task_ids`."""
        self._begin(task_ids, None, _named(args, kwargs), decoding=True)
        return self.model.generate(*args, **kwargs)

    def set_task(self, task: int | None) -> None:
        """Use `task` for batches that come without `task_ids`; None forgets it."""
        if task is not None:
            self._check_tasks(torch.tensor([task]))
        self.context.default_task = task

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

    def _layers(self, adapter_name: str) -> list[MoreLinear]:
        return [m for m in self.model.modules() if isinstance(m, MoreLinear) and adapter_name in m.more_A]

    def ranks(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The task-to-rank table: (tasks,) from 1 to r, by the name of the adapted map."""
        return {layer.key: layer.ranks(adapter_name).clone() for layer in self._layers(adapter_name)}

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, task: int | None = None
    ) -> None:
        """Merge the update of one task into the base weights; `unmerge_adapter` undoes it to the bit.

        Raises:
            ValueError: several tasks are known and neither `task` nor `set_task` says which.
        """
        with self._merging(task):
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        task: int | None = None,
    ) -> nn.Module:
        """Return the base model with one task's update merged in, an ordinary model."""
        # Merged as a whole first: unloading map by map could stop half way at a map that cannot be merged.
        self.merge_adapter(adapter_names, safe_merge, task)
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        return self.model

    @contextmanager
    def _merging(self, task: int | None) -> Iterator[None]:
        default = self.context.default_task
        num_tasks = max(config.num_tasks for config in self.peft_config.values())
        chosen = task if task is not None else default if default is not None else 0 if num_tasks == 1 else None
        if chosen is None:
            raise ValueError(f"the adapter knows {num_tasks} tasks; say which one to merge: task=0 to {num_tasks - 1}")
        if self.context.merged_task is not None:
            raise ValueError(f"task {self.context.merged_task} is merged already; call unmerge_adapter() first")
        self.context.merged_task = chosen
        try:
            yield
        except BaseException:
            self.unmerge_adapter()
            self.context.merged_task = None
            raise

    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _check_tasks(self, task_ids: Tensor) -> None:
        """Refuse tasks that an active adapter does not know; on a GPU indexing does, without a synchronisation."""
        num_tasks = min(self.peft_config[name].num_tasks for name in self.active_adapters)
        if task_ids.device.type == "cpu" and bool(((task_ids < 0) | (task_ids >= num_tasks)).any()):
            raise ValueError(
                f"task_ids holds {task_ids.unique().tolist()}; the adapter knows tasks 0 to {num_tasks - 1}"
            )

    def _begin(
        self, task_ids: Tensor | None, prompt_mask: Tensor | None, inputs: dict[str, Any], decoding: bool = False
    ) -> None:
        tokens = next((inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None), None)
        if task_ids is not None:
            if task_ids.dim() != 1 or (tokens is not None and len(task_ids) != len(tokens)):
                rows = "(batch,)" if tokens is None else f"({len(tokens)},)"
                found = tuple(task_ids.shape)
                raise ValueError(f"task_ids has shape {found}; it must hold one task per example: {rows}")
            self._check_tasks(task_ids)
        merged = self.context.merged_task
        if merged is not None and task_ids is not None and bool((task_ids != merged).any()):
            raise ValueError(f"task {merged} is merged into the weights, and the batch holds others; unmerge first")
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        target = inputs.get("decoder_attention_mask") if labels is None else labels != IGNORED
        if prompt_mask is None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = None if tokens is None else torch.ones(tokens.shape[:2], device=tokens.device)
        if prompt_mask is None:
            prompt_mask = mask
            if mask is not None and target is not None and not self._is_encoder_decoder():
                prompt_mask = _prompt(mask, target) if target.shape == mask.shape else mask
        self.context.begin(task_ids, prompt_mask, target, decoding)

    def _add_to_loss(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        """Add the auxiliary loss, in the share of the whole batch that this micro-batch's labels have.

        A trainer that divides the loss by the label tokens of all its micro-batches (`num_items_in_batch`) sums the
        micro-batches' losses; the contrastive loss is then weighted by tokens like the rest, or it would be counted
        once per micro-batch.
        """
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        auxiliary = self.losses["contrastive"]
        if inputs.get("num_items_in_batch") is not None:
            auxiliary = auxiliary * (inputs["labels"] != IGNORED).sum() / inputs["num_items_in_batch"]
        self.losses["lm"] = loss.detach()
        if isinstance(outputs, tuple):
            return (loss + auxiliary, *outputs[1:])
        outputs.loss = loss + auxiliary
        return outputs


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name; Hugging Face models take the token ids first."""
    return {**kwargs, "input_ids": args[0]} if args else kwargs


def _prompt(mask: Tensor, target: Tensor) -> Tensor:
    """(batch, length) the real tokens which are no label; all real tokens of an example whose labels are everywhere."""
    prompt = mask * ~target.bool()
    return torch.where(prompt.any(1, keepdim=True), prompt, mask)


def _role(key: str, is_encoder_decoder: bool) -> str:
    """Which sequence a map reads: outside an encoder, all but the cross-attention's keys and values read the target."""
    parts = key.split(".")
    in_decoder = is_encoder_decoder and "encoder" not in parts
    reads_encoder = any(part in CROSS_ATTENTION for part in parts) and parts[-1] in KEYS_AND_VALUES
    return TARGET if in_decoder and not reads_encoder else SOURCE
