"""One adapted linear map of MoRE."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from more_ds.numerics import at_least_float32
from more_ds.tuners.context import TaskContext, repeat_rows
from more_ds.tuners.more.gated import GatedMap


class MoreLinear(GatedMap):
    """A frozen linear map with one MoRE pair per adapter.

    PEFT's `all-linear` knows an adapted layer by the `Linear` in its class name.
    """

    def __init__(self, base_layer: nn.Module, context: TaskContext, role: str, key: str) -> None:
        """Wrap `base_layer`: `nn.Linear`, GPT-2's `Conv1D`, or a quantised linear layer that PEFT knows.

        The others are those of `GatedMap`.
        """
        inside: Any = base_layer
        while hasattr(inside, "base_layer"):
            inside = inside.base_layer
        in_features, out_features = _get_in_out_features(inside)
        super().__init__(context, role, key, in_features, out_features)  # type: ignore[arg-type]
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(inside)

    def factor(self, in_features: int, out_features: int) -> nn.Module:
        """A fresh A or B."""
        return nn.Linear(in_features, out_features, bias=False)

    def reads(self, *inputs: Any) -> Tensor:
        """The input of the map."""
        x: Tensor = inputs[0]
        return x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, ..., in) to (batch, ..., out): the base map plus the active adapters' updates."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        step = self.context.step
        if step is not None and self.key in step.bank.place and not args and not kwargs:
            return step.run(self, x)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.more_A:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        config = self.configs[name]
        # Before it is cast: maps that read one tensor know each other by it.
        dropped = self.context.drop(x, config.lora_dropout) if self.training else x
        x, dropped = (self._cast_input_dtype(part, self.more_A[name].weight.dtype) for part in (x, dropped))
        weights = repeat_rows(self._multipliers(name, x, lambda: x), x.shape[0])
        weights = weights.view(weights.shape[0], *[1] * (x.dim() - 2), -1)
        hidden = self.more_A[name](dropped)
        update: Tensor = self.more_B[name](hidden * weights.to(hidden.dtype))
        return update

    def get_delta_weight(self, adapter: str, task: int | None) -> Tensor:
        """B diag(v) A of one task, (out, in) float32.

        Raises:
            ValueError: the adapter does not know the task, or gates on the input, so that no single matrix
                describes a task.
        """
        weights = self._weights_of_task(adapter, task)
        return (at_least_float32(self.more_B[adapter].weight) * weights) @ at_least_float32(self.more_A[adapter].weight)
