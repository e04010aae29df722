"""What a method needs that adds an update to the outputs of frozen modules: a configuration and an `Update`.

The layer, the tuner and the registration with PEFT are the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from more_ds.tuners.base import MergesByTask, check_task, peft_type
from more_ds.tuners.context import TaskContext, repeat_rows
from more_ds.tuners.linear import TARGETS

SHARED = "shared_update"
"""The name under which the base model carries what all its adapted modules share."""


class Update(nn.Module):
    """What one adapted module is trained to add to its output.

    Parameters belong to this module itself, and are read in `forward` alone, so that ZeRO-3 has them there.

    Attributes:
        key: name of the adapted module in the model.
    """

    key = ""

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        """Make the parameters, without values."""
        super().__init__()
        self.config, self.in_features, self.out_features = config, in_features, out_features

    def reset(self) -> None:
        """Give the parameters their values at the start."""
        raise NotImplementedError

    def forward(self, x: Tensor, output: Tensor, tasks: Any, shared: Any) -> Tensor:
        """The update.

        Args:
            x: (batch, ..., in) what the module reads.
            output: (batch, ..., out) what it returns.
            tasks: (batch,) task of every row, or None if the method does not route by task.
            shared: what the method's shared module returned for this batch, or None if it has none.

        Returns:
            (batch, ..., out)
        """
        raise NotImplementedError

    def factors(self, task: int, shared: Any) -> tuple[Tensor, Tensor]:
        """The update of a task as A, (rank, in), and B, (out, rank), in float32: it adds B A x.

        Raises:
            ValueError: no such matrices do what the method does.
        """
        raise ValueError(
            f"{self.config.method} is no low-rank update of the weights that is fixed for a task; it cannot be merged "
            "or written as a LoRA; use the adapter as it is"
        )


@dataclass
class UpdateConfig(PeftConfig):
    """Options of every method with an `Update`."""

    method: ClassVar[str]
    update_class: ClassVar[type[Update]]

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": TARGETS},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or a regular expression."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' list."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform; give both or neither")

    def shared_module(self, widths: dict[str, int]) -> nn.Module | None:
        """What all adapted modules of a model share, called before every batch; `widths` of their outputs, by name."""
        return None

    def at_least_one(self, *names: str) -> None:
        """Refuse options that are below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 1")

    def above_zero(self, *names: str) -> None:
        """Refuse options that are not above 0."""
        for name in names:
            if getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in order: the same settings are written as the same bytes."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}


@dataclass
class TasksConfig(PeftConfig):
    """Options of a method that routes by task."""

    num_tasks: int = field(default=1, metadata={"help": "Number of tasks T."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in task_ids' order."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tasks < 1:
            raise ValueError(f"{type(self).__name__}.num_tasks is {self.num_tasks}; it must be at least 1")
        if self.task_names is not None and len(self.task_names) != self.num_tasks:
            found = f"{len(self.task_names)} names for num_tasks={self.num_tasks}"
            raise ValueError(f"{type(self).__name__}.task_names has {found}")


class UpdateLayer(nn.Module, BaseTunerLayer):
    """What a method has in one place of the model: an `nn.Module` by adapter, under `update`."""

    adapter_layer_names = ("update",)

    def __init__(self) -> None:
        super().__init__()
        self.update: Any = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.frozen_peft_weight_names = {}


class SharedLayer(UpdateLayer):
    """What all adapted modules of a model share. PEFT saves, loads and freezes it like the layers."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the layers merge."""

    def unmerge(self) -> None:
        """Nothing."""


class UpdateLinear(MergesByTask, UpdateLayer):
    """A frozen module with one `Update` per adapter. PEFT's `all-linear` knows it by the `Linear` in its name."""

    other_param_names = ("configs",)
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, context: TaskContext, key: str) -> None:
        """Wrap `base_layer`, the module `key` of a model: linear, GPT-2's `Conv1D`, or quantised."""
        super().__init__()
        self.base_layer, self.context, self.key = base_layer, context, key
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())  # type: ignore[assignment]
        self.configs: dict[str, Any] = {}
        self._memory: list[Any] = []

    def update_layer(self, adapter_name: str, config: UpdateConfig) -> None:
        """Add an adapter."""
        self.configs[adapter_name] = config
        update = config.update_class(config, self.in_features, self.out_features)
        update.key = self.key
        if not any(tensor.is_meta for tensor in update.parameters()):
            update.reset()
        self.update[adapter_name] = update
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, ..., in) to (batch, ..., out): the base module plus the active adapters' updates."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.update:
                result = result + self._updated(name, x, output).to(result.dtype)
        return result

    def _updated(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        update = self.update[name]
        dtype = next((p.dtype for p in update.parameters()), output.dtype)
        tasks = None
        if isinstance(self.configs[name], TasksConfig):
            tasks = repeat_rows(self.context.rows(self.configs[name].num_tasks, x.device), len(x))
        x, output = self._cast_input_dtype(x, dtype), self._cast_input_dtype(output, dtype)
        return update(x, output, tasks, self.context.shared.get(name))

    def get_delta_weight(self, adapter: str, task: int | None) -> Tensor:
        """The update of a task, (out, in) float32.

        Raises:
            ValueError: the adapter does not know the task, or its update is no matrix.
        """
        num_tasks = getattr(self.configs[adapter], "num_tasks", 1)
        a, b = self.update[adapter].factors(check_task(task, num_tasks), self.context.shared.get(adapter))
        return b @ a

    def __repr__(self) -> str:
        return "update." + super().__repr__()
