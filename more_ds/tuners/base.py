"""What PEFT leaves to do for tuners that live outside of PEFT and route by task.

PEFT keeps its methods in a closed enumeration, and passes `task_ids` on to its own Poly alone. Both are opened here,
once, for every tuner of this package.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from more_ds.numerics import at_least_float32
from more_ds.tuners.context import TaskContext

TASK_IDS = "tuner_task_ids"
"""The name under which `task_ids` reaches a tuner's forward through PEFT's model classes."""
UPDATE = "update"
"""The name under which the layers of our tuners keep what they train, by adapter."""

PARTITIONED = "the base weight is partitioned by ZeRO-3; merge the saved adapter in a process of its own"
"""Why nothing is merged into weights that are not here."""
NOT_FINITE = "the merged weight is not finite; the adapter seems to be broken"
"""Why a careful merge leaves the weights as they were."""


def register(name: str, config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Make a tuner known to PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` build it.

    Args:
        name: lower-case method name; the tuner's `prefix` must be `name + "_"`.
        config_cls: a `PeftConfig` whose `peft_type` is `peft_type(name)`.
        model_cls: the `BaseTuner`.
    """
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    for peft_model_cls in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values():
        _carry_task_ids(peft_model_cls)
    for method in ("forward", "generate"):
        _call_tuner(method)


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enumeration for `name`, added to it if PEFT does not have it."""
    key = name.upper()
    if key in PeftType._member_map_:
        return PeftType[key]
    member = str.__new__(PeftType, key)
    member._name_, member._value_ = key, key
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_map_[key] = member
    PeftType._member_names_.append(key)
    PeftType._value2member_map_[key] = member
    type.__setattr__(PeftType, key, member)
    return member


def _carry_task_ids(peft_model_cls: type) -> None:
    """Let `forward(task_ids=...)` of a PEFT model class reach tuners that ask for it (`routes_by_task`)."""
    original = peft_model_cls.forward  # type: ignore[attr-defined]
    if getattr(original, "_carries_task_ids", False):
        return

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "task_ids" in kwargs and getattr(self.base_model, "routes_by_task", False):
            kwargs[TASK_IDS] = kwargs.pop("task_ids")
        return original(self, *args, **kwargs)

    forward._carries_task_ids = True  # type: ignore[attr-defined]
    peft_model_cls.forward = forward  # type: ignore[attr-defined]


def _call_tuner(method: str) -> None:
    """Let `PeftModel`, the class of a model without `task_type`, call a tuner of ours and not the model inside it."""
    original = getattr(PeftModel, method)
    if getattr(original, "_calls_tuner", False):
        return

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.base_model, "begins_batches", False):
            return getattr(self.base_model, method)(*args, **kwargs)
        return original(self, *args, **kwargs)

    call._calls_tuner = True  # type: ignore[attr-defined]
    setattr(PeftModel, method, call)


class MergesByTask(BaseTunerLayer):
    """A layer whose update of one task is a matrix: it merges into the base weight, and comes out again to the bit.

    Attributes:
        context: of the model; its `merged_task` says which task.
    """

    context: TaskContext
    merged_adapters: list[str]
    _memory: list[Any]

    def get_delta_weight(self, adapter: str, task: int | None) -> Tensor:
        """The update of a task, (out, in) float32.

        Raises:
            ValueError: the adapter does not know the task, or its update is no matrix.
        """
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of the context's merge task to the base weight, in float32."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in getattr(self, self.adapter_layer_names[0]):
                self._memory.append(self._add(name, safe_merge))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base weight back, to the bit."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self._restore(self._memory.pop())
        self.context.merged_task = None

    def _add(self, name: str, safe: bool) -> Any:
        """Add an adapter's update to the base weight and return what `_restore` needs; see `add_to_base`."""
        return add_to_base(self, self.get_delta_weight(name, self.context.merged_task), safe)

    def _restore(self, memory: Any) -> None:
        """Undo `_add`."""
        restore_base(self, memory)


def check_task(task: int | None, num_tasks: int) -> int:
    """Refuse a task that an adapter of `num_tasks` does not know.

    Raises:
        ValueError: naming those that it knows.
    """
    if task is None or not 0 <= task < num_tasks:
        raise ValueError(f"task {task} is out of range; the adapter knows tasks 0 to {num_tasks - 1}")
    return task


def add_to_base(layer: BaseTunerLayer, delta: Tensor, safe: bool) -> Any:
    """Add `delta` to a tuner layer's frozen weight and return what `restore_base` needs to undo it to the bit.

    The sum is taken in float32 and stored in the weight's own type (quantised again where the base is quantised).

    Args:
        layer: a tuner layer; its base may be `nn.Linear`, GPT-2's `Conv1D`, or a quantised linear layer.
        delta: (out, in) float32.
        safe: refuse a sum that is not finite, and leave the weight as it was.

    Raises:
        ValueError: the weight is packed by a quantiser that has no way back (GPTQ, AWQ), it is not whole on this rank
            (ZeRO-3), or `safe` and the sum is not finite.
    """
    base: Any = layer.get_base_layer()
    backend: Any = layer.quantization_backend
    refuse_packed(base, backend)
    weight = base.weight
    if weight.numel() == 0:
        raise ValueError(PARTITIONED)
    whole = backend.get_base_weight(base) if backend is not None else weight.data
    merged = at_least_float32(whole) + (delta.T if isinstance(base, Conv1D) else delta)
    if safe and not torch.isfinite(merged).all():
        raise ValueError(NOT_FINITE)
    # The attributes too: bitsandbytes marks the old weight as not quantised when it makes another of it.
    memory = (base, weight, dict(weight.__dict__), copy.copy(getattr(base, "state", None)))
    if backend is not None:
        backend.set_base_weight(layer, merged.to(whole.dtype))
    else:
        base.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=weight.requires_grad)
    return memory


def refuse_packed(base: nn.Module, backend: Any) -> None:
    """Refuse to merge into a map whose weight is packed by a quantiser that PEFT's `backend` knows no way back from.

    Raises:
        ValueError: it is.
    """
    weight = getattr(base, "weight", None)
    if backend is None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise ValueError(
            f"{type(base).__name__} keeps packed integers, which no update can be added to; leave the adapter as it "
            "is, or export it as a LoRA (launch/export.py --form lora)"
        )


def restore_base(layer: Any, memory: Any) -> None:
    """Undo `add_to_base`."""
    base, weight, attributes, state = memory
    weight.__dict__.clear()
    weight.__dict__.update(attributes)
    base.weight = weight
    if state is not None:
        base.state = state
    layer.base_layer = base
