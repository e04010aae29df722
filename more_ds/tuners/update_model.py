"""The tuner of every method with an `Update`, and its registration with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from more_ds.tuners.base import register
from more_ds.tuners.linear import is_linear
from more_ds.tuners.routed import RoutedModel
from more_ds.tuners.update import SHARED, SharedLayer, UpdateConfig, UpdateLayer, UpdateLinear

__all__ = ["UpdateModel", "register"]


class UpdateModel(RoutedModel):
    """A model whose adapted modules carry an `Update`, and which may carry one module that they share."""

    routes_by_task = False
    tuner_layer_cls: Any = UpdateLayer
    layer_class: type[UpdateLinear] = UpdateLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model: its layers, then what they share.

        In this order, because PEFT freezes a base model only if it finds no adapter in it.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        module = config.shared_module(self._widths(adapter_name))
        if module is None:
            return
        if not hasattr(model, SHARED):
            setattr(model, SHARED, SharedLayer())
            getattr(model, SHARED)._active_adapter = adapter_name
        layer: Any = getattr(model, SHARED)
        layer.update[adapter_name] = module
        device = next(model.parameters()).device
        if device.type != "meta":
            layer.to(device)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

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
        if isinstance(target, UpdateLinear):
            target.update_layer(adapter_name, peft_config)
            return
        self._check_target(target, current_key, peft_config)
        layer = self.layer_class(target, self.context, current_key)
        self._put(layer, adapter_name, peft_config, parent, target_name, target)

    def _check_target(self, target: nn.Module, key: str, config: UpdateConfig) -> None:
        if not is_linear(target):
            raise ValueError(
                f"target module {key} is a {type(target).__name__}; {config.method} adapts linear maps only"
            )

    def _begin(
        self, task_ids: Tensor | None, prompt_mask: Tensor | None, inputs: dict[str, Any], decoding: bool = False
    ) -> None:
        super()._begin(task_ids if self.routes_by_task else None, prompt_mask, inputs, decoding)
        shared: Any = getattr(self.model, SHARED, None)
        if shared is not None and not shared.disable_adapters:
            self.context.shared.update(
                {n: self._share(shared.update[n]) for n in self.active_adapters if n in shared.update}
            )

    def _shared(self, layer: Any, names: Sequence[str]) -> dict[str, Any]:
        """What the layers are given of the adapters `names` of the shared layer, by name."""
        return {name: self._share(layer.update[name]) for name in names if name in layer.update}

    def _share(self, module: Any) -> Any:
        """What the layers are given of a shared module for the batch that begins."""
        return module()

    def _widths(self, adapter_name: str) -> dict[str, int]:
        """Output width of every adapted map, by name."""
        layers = [m for m in self.model.modules() if isinstance(m, UpdateLinear) and adapter_name in m.update]
        return {layer.key: layer.out_features for layer in layers}

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, task: int | None = None
    ) -> None:
        """Merge the update of one task into the base weights; `unmerge_adapter` undoes it to the bit.

        Raises:
            ValueError: the method cannot be merged, or several tasks are known and none is named.
        """
        shared: Any = getattr(self.model, SHARED, None)
        if shared is not None:
            with torch.no_grad():
                names = adapter_names or self.active_adapters
                self.context.shared = {
                    name: self._share(shared.update[name].eval()) for name in names if name in shared.update
                }
        super().merge_adapter(adapter_names, safe_merge, task)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if hasattr(self.model, SHARED):
            delattr(self.model, SHARED)
        return unloaded
