"""Memory of one rank: what DeepSpeed holds for a model whose base is frozen, by ZeRO stage.

DeepSpeed's own estimators (`estimate_zero3_model_states_mem_needs`) count 16 bytes and more for every parameter, as if
all were trained. Here a frozen parameter costs its own bytes and nothing else; gradients, master values and Adam's
moments belong to the adapter alone. The rules were read in DeepSpeed 0.19.8 and measured (`eval/plan_check.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from more_ds.model import parameters_by_kind
from more_ds.optimizers import BLOCK
from more_ds.planner.trace import Workload, build

MOMENT_BYTES = {
    "adamw_torch": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_bnb_8bit": 2 + 2 * 4 / BLOCK,
    "paged_adamw_8bit": 2 + 2 * 4 / BLOCK,
}
"""Of a trained value: two in float32, or two codes and two scales for each block. Paged ones are counted where they are
as long as there is room: on the GPU."""

LEAST_8BIT = 4096
"""Values below which bitsandbytes leaves the moments of a tensor in float32."""

MASTER_BYTES = 4
"""The value that the optimizer moves, in float32."""

QUANTIZED_BYTES = {"none": None, "8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a quantised value. NF4: half a byte, a scale of one byte per 64 values, one of four per 256 scales (QLoRA,
section 3); the scale per row of the 8-bit form is left out."""

PROCESS_BYTES = 1.2e9
"""The CUDA context, cuBLAS workspaces and NCCL's buffers of a process on a GPU; an assumption."""

FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the caching allocator holds beyond them; an assumption."""


@dataclass(frozen=True)
class Inventory:
    """The parameters of a model with its adapter.

    Attributes:
        trainable: number of values of each trained parameter.
        frozen: number of values of each frozen one.
        quantizable: which frozen ones are weights of linear maps that bitsandbytes replaces; all but the output's.
        kinds: trained values by kind.
        buffers: bytes of what every rank holds besides, whole at any stage: finished LoRAs and prompts.
    """

    trainable: np.ndarray
    frozen: np.ndarray
    quantizable: np.ndarray
    kinds: dict[str, int]
    buffers: float = 0.0

    @property
    def num_trainable(self) -> int:
        """Trained values."""
        return int(self.trainable.sum())

    @property
    def num_frozen(self) -> int:
        """Frozen values."""
        return int(self.frozen.sum())


@dataclass(frozen=True)
class Setting:
    """How a model is held.

    Attributes:
        ds_config: DeepSpeed's configuration; only `zero_optimization` is read.
        world: number of ranks.
        ranks_per_node: ranks that share a host's memory.
        quantization: of the frozen linear maps: `none`, `8bit`, `4bit`.
        on_gpu: whether there is a GPU, with a context and a caching allocator of its own.
        optim: name of the optimizer.
    """

    ds_config: Mapping[str, Any]
    world: int
    ranks_per_node: int = 1
    quantization: str = "none"
    on_gpu: bool = True
    optim: str = "adamw_torch"

    @property
    def zero(self) -> Mapping[str, Any]:
        """The section on ZeRO."""
        section: Mapping[str, Any] = self.ds_config.get("zero_optimization", {})
        return section

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero.get("stage", 0))

    @property
    def sharing(self) -> int:
        """Ranks among which ZeRO-3 gathers frozen weights: those of a node where it has a copy of them (hpZ)."""
        copies = int(self.zero.get("zero_hpz_partition_size", 1))
        return copies if copies > 1 else self.world

    def offloads(self, what: str) -> bool:
        """Whether `offload_optimizer` or `offload_param` moves a part to the host."""
        return (self.zero.get(what) or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        device: by what they are for, on the GPU.
        host: the same in a node's memory, of all its ranks.
    """

    device: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes on the GPU, margins included."""
        return sum(self.device.values())


def inventory(workload: Workload) -> Inventory:
    """Count the parameters of the whole model, from shapes alone."""
    model = build(workload)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    linear = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not _trains(m.weight)
    }
    frozen = [p for p in model.parameters() if not _trains(p)]
    return Inventory(
        trainable=np.array([p.numel() for p in model.parameters() if _trains(p)], dtype=np.float64),
        frozen=np.array([p.numel() for p in frozen], dtype=np.float64),
        quantizable=np.array([id(p) in linear for p in frozen], dtype=bool),
        kinds=parameters_by_kind(model),
        buffers=float(sum(b.numel() * b.element_size() for b in model.buffers())),
    )


def _trains(parameter: torch.Tensor) -> bool:
    return parameter.requires_grad


def states(parameters: Inventory, workload: Workload, setting: Setting) -> Memory:
    """What a rank holds between the steps and while it reduces, activations apart."""
    parts = _partitioned(parameters, workload, setting) if setting.stage == 3 else _whole(parameters, workload, setting)
    host: dict[str, float] = {}
    for what, names in (("offload_optimizer", ("optimizer", "gradients")), ("offload_param", ("weights",))):
        if setting.offloads(what):
            for name in names:
                host[name] = parts[name] * setting.ranks_per_node
                parts[name] = 0.0
    return Memory(parts, host | {"loading": _loading(parameters, workload, setting)})


def with_activations(held: Memory, saved: float, peak: float, on_gpu: bool) -> Memory:
    """Add what a micro-batch needs, and the margins of a GPU.

    Args:
        held: from `states`.
        saved: bytes kept for the backward pass.
        peak: the most bytes of activations at once.
        on_gpu: whether there are margins to add.
    """
    parts = held.device | {"activations": saved, "temporary": max(0.0, peak - saved)}
    if on_gpu:
        parts |= {"fragmentation": FRAGMENTATION * sum(parts.values()), "process": PROCESS_BYTES}
    return Memory(parts, held.host)


def frozen_bytes(parameters: Inventory, workload: Workload, quantization: str) -> np.ndarray:
    """Bytes of each frozen parameter."""
    plain = float(workload.dtype.itemsize)
    small = QUANTIZED_BYTES[quantization]
    size = plain if small is None else np.where(parameters.quantizable, small, plain)
    return parameters.frozen * size


def _whole(parameters: Inventory, workload: Workload, setting: Setting) -> dict[str, float]:
    """Stages 0 to 2: every rank has all weights; 1 and 2 cut the optimizer, 2 the gradients."""
    count, world = parameters.num_trainable, setting.world
    size = workload.adapter_dtype.itemsize
    frozen = frozen_bytes(parameters, workload, setting.quantization)
    parts = {"weights": float(frozen.sum() + count * size) + parameters.buffers}
    if setting.stage == 0:
        # Without ZeRO, float32 values are moved in place, others have a master copy whose gradient is float32 too.
        copies = 0 if workload.adapter_dtype == torch.float32 else MASTER_BYTES
        parts["gradients"] = count * (size + copies)
        parts["optimizer"] = count * copies + _moments(parameters, setting)
        parts["buckets"] = 0.0
    else:
        parts["gradients"] = count * (4.0 if setting.stage == 1 else 4.0 / world)
        parts["optimizer"] = (count * MASTER_BYTES + _moments(parameters, setting)) / world
        parts["buckets"] = _bucket(setting, size)
    parts["gathers"] = _unpacked(parameters, workload, setting)
    return parts


def _partitioned(parameters: Inventory, workload: Workload, setting: Setting) -> dict[str, float]:
    """Stage 3: each rank keeps a part of everything, small parameters besides as a whole, and gathers the others.

    A copy inside the node (hpZ) is of what is gathered; for frozen weights it is made in the first step and stays.
    """
    zero, world = setting.zero, setting.world
    threshold = float(zero.get("stage3_param_persistence_threshold", 1e5))
    size = workload.adapter_dtype.itemsize
    frozen = frozen_bytes(parameters, workload, setting.quantization)
    kept = 0.0
    if world > 1:  # a part that is the whole is not copied
        kept += float(frozen[parameters.frozen <= threshold].sum())
        kept += float(parameters.trainable[parameters.trainable <= threshold].sum()) * size
    copies = 0.0 if setting.sharing == world else float(frozen[parameters.frozen > threshold].sum()) / setting.sharing
    count = parameters.num_trainable
    return {
        "weights": (float(frozen.sum()) + count * size) / world + kept + parameters.buffers,
        "copy inside the node": copies,
        "gradients": count * 4.0 / world,
        "optimizer": (count * MASTER_BYTES + _moments(parameters, setting)) / world,
        "buckets": _bucket(setting, size),
        "gathers": _gathered(parameters, workload, setting) + _unpacked(parameters, workload, setting),
    }


def _moments(parameters: Inventory, setting: Setting) -> float:
    """Bytes of the moments of all ranks. Without ZeRO every tensor has its own; else all lie end to end, in codes."""
    each: Any = MOMENT_BYTES[setting.optim]
    if setting.stage == 0:
        each = np.where(parameters.trainable < LEAST_8BIT, MOMENT_BYTES["adamw_torch"], each)
    return float((parameters.trainable * each).sum())


def checkpoint_bytes(parameters: Inventory, optim: str) -> float:
    """Bytes of a checkpoint: values and moments in float32, and of an optimizer in 8 bits a scale for each moment."""
    in_codes = MOMENT_BYTES[optim] < MOMENT_BYTES["adamw_torch"]
    return parameters.num_trainable * float(MASTER_BYTES + MOMENT_BYTES["adamw_torch"] * (2 if in_codes else 1))


def _bucket(setting: Setting, size: int) -> float:
    """The contiguous buffer that gradients are reduced from; two with `overlap_comm` in stages 1 and 2."""
    zero = setting.zero
    if not zero.get("contiguous_gradients", True):
        return 0.0
    two = bool(zero.get("overlap_comm", False)) and setting.stage < 3
    return float(zero.get("reduce_bucket_size", 5e8)) * size * (2 if two else 1)


def _gathered(parameters: Inventory, workload: Workload, setting: Setting) -> float:
    """The most bytes of partitioned weights that a rank has whole at once.

    Where forward turns into backward, a weight is kept if it is used again within `stage3_max_reuse_distance` values,
    counted there and back; besides, `stage3_prefetch_bucket_size` values are fetched ahead.
    """
    zero = setting.zero
    partitioned = parameters.frozen > float(zero.get("stage3_param_persistence_threshold", 1e5))
    sizes = parameters.frozen[partitioned]
    if not len(sizes) or setting.world == 1:
        return 0.0
    reuse = min(float(zero.get("stage3_max_reuse_distance", 1e9)), float(zero.get("stage3_max_live_parameters", 1e9)))
    window = reuse / 2 + float(zero.get("stage3_prefetch_bucket_size", 5e7)) + float(sizes.max())
    whole = frozen_bytes(parameters, workload, setting.quantization)[partitioned]
    return float(whole.sum() * min(1.0, window / sizes.sum()))


def _unpacked(parameters: Inventory, workload: Workload, setting: Setting) -> float:
    """The largest quantised weight in the model's own type, as it is multiplied with."""
    if setting.quantization == "none" or not parameters.quantizable.any():
        return 0.0
    return float(parameters.frozen[parameters.quantizable].max()) * workload.dtype.itemsize


def unpacking_traffic(parameters: Inventory, workload: Workload, quantization: str) -> float:
    """Bytes that a micro-batch reads and writes to unpack quantised weights, anew in each pass over them."""
    if quantization == "none":
        return 0.0
    passes = 3 if workload.checkpointing else 2
    packed = frozen_bytes(parameters, workload, quantization)[parameters.quantizable].sum()
    return passes * float(packed + parameters.frozen[parameters.quantizable].sum() * workload.dtype.itemsize)


def _loading(parameters: Inventory, workload: Workload, setting: Setting) -> float:
    """Host bytes of a node while the weights are read: a copy per rank; under ZeRO-3 one parameter after the other.

    What is mapped from the files is not counted: the system takes it back where it needs the memory.
    """
    size = float(workload.dtype.itemsize)
    if setting.stage == 3 and setting.quantization == "none":
        return float(parameters.frozen.max(initial=0.0)) * size * setting.ranks_per_node
    return parameters.num_frozen * size * setting.ranks_per_node
