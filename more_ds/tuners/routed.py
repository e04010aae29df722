"""What tuners of this package have in common: a batch has tasks and a mask, and a task merges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from more_ds.losses import IGNORED
from more_ds.tuners.base import TASK_IDS
from more_ds.tuners.context import TaskContext
from more_ds.tuners.linear import name_targets


class RoutedModel(BaseTuner):
    """A tuner whose layers share a `TaskContext`, which is told of every batch before it runs.

    `forward` and `generate` take `task_ids`, (batch,), beside the base model's own arguments. If the method has a loss
    of its own, `outputs.loss` contains it in training mode; `losses` holds the parts, weighted: `lm` (if labels were
    given) and `auxiliary_name`. Without labels, add `auxiliary_loss` yourself.
    """

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    routes_by_task = True
    begins_batches = True
    auxiliary_name = "auxiliary"
    peft_config: dict[str, Any]
    context: TaskContext

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.__dict__.setdefault("context", TaskContext())

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        name_targets(peft_config, model)  # of every adapter, not of the first alone

    def _put(
        self, layer: Any, adapter_name: str, config: Any, parent: nn.Module, target_name: str, target: nn.Module
    ) -> None:
        """Give a fresh layer its first adapter, and put it in the place of `target`, which it wraps."""
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        if new_module is getattr(child, "base_layer", None):
            setattr(parent, child_name, new_module)  # PEFT asks for its `weight`, which packed maps and experts lack
        else:
            super()._replace_module(parent, child_name, new_module, child)

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
        auxiliary = self._auxiliary()
        if auxiliary is not None:
            self.losses[self.auxiliary_name] = auxiliary
            if kwargs.get("labels") is not None:
                outputs = self._add_to_loss(outputs, auxiliary, kwargs)
        return outputs

    def _auxiliary(self) -> Tensor | None:
        """The method's own loss of the forward pass that has ended, a scalar, weighted; None outside training."""
        return None

    @property
    def losses(self) -> dict[str, Tensor]:
        """The parts of the last training loss, scalars."""
        return self.context.losses

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """The method's own loss of the last forward pass, a scalar, weighted; None outside training."""
        return self.losses.get(self.auxiliary_name)

    def generate(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate` for a batch of tasks, (batch,) `task_ids`."""
        self._begin(task_ids, None, _named(args, kwargs), decoding=True)
        return self.model.generate(*args, **kwargs)

    def set_task(self, task: int | None) -> None:
        """Use `task` for batches that come without `task_ids`; None forgets it."""
        if task is not None:
            self._check_tasks(torch.tensor([task]))
        self.context.default_task = task

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
        self._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        return self.model

    @contextmanager
    def _merging(self, task: int | None) -> Iterator[None]:
        default = self.context.default_task
        num_tasks = max(map(_num_tasks, self.peft_config.values()))
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
        num_tasks = min(_num_tasks(self.peft_config[name]) for name in self.active_adapters)
        readable = task_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        told = set(task_ids.tolist()) if readable else set()
        if not told <= set(range(num_tasks)):
            raise ValueError(f"task_ids holds {sorted(told)}; the adapter knows tasks 0 to {num_tasks - 1}")

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

    def _add_to_loss(self, outputs: Any, auxiliary: Tensor, inputs: dict[str, Any]) -> Any:
        """Add the auxiliary loss, in the share of the whole batch that this micro-batch's labels have.

        A trainer that divides the loss by the label tokens of all its micro-batches (`num_items_in_batch`) sums the
        micro-batches' losses; the auxiliary loss is then weighted by tokens like the rest, or it would be counted
        once per micro-batch.
        """
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        if inputs.get("num_items_in_batch") is not None:
            auxiliary = auxiliary * (inputs["labels"] != IGNORED).sum() / inputs["num_items_in_batch"]
        self.losses["lm"] = loss.detach()
        if isinstance(outputs, tuple):
            return (loss + auxiliary, *outputs[1:])
        outputs.loss = loss + auxiliary
        return outputs


def _num_tasks(config: Any) -> int:
    return int(getattr(config, "num_tasks", 1))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name; Hugging Face models take the token ids first."""
    return {**kwargs, "input_ids": args[0]} if args else kwargs


def _prompt(mask: Tensor, target: Tensor) -> Tensor:
    """(batch, length) the real tokens which are no label; all real tokens of an example whose labels are everywhere."""
    prompt = mask * ~target.bool()
    return torch.where(prompt.any(1, keepdim=True), prompt, mask)
