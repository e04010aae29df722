"""Time of one optimizer step: arithmetic, memory traffic, kernel launches, and what the ranks send each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from more_ds.planner.memory import Inventory, Setting, frozen_bytes
from more_ds.planner.trace import Workload

OVERLAP = 0.5
"""Share of ZeRO-3's gathers that hides behind the arithmetic, at most all of that; an assumption."""

HOST_LINK = 20e9
"""Bytes per second between a GPU and its host's memory, over PCIe 4; an assumption."""

HOST_ADAM = 2e9
"""Values per second that the host's AdamW moves for one rank; an assumption."""


@dataclass(frozen=True)
class Speed:
    """What a device reaches, not what its data sheet says.

    Attributes:
        flops: per second, in matrix products.
        bandwidth: bytes per second of its memory.
        kernel: seconds that every operation takes, however small.
        launch: seconds that the host needs to start one; it runs ahead of the device, so the slower of both counts.
    """

    flops: float
    bandwidth: float
    kernel: float
    launch: float = 0.0


@dataclass(frozen=True)
class Links:
    """How the ranks are joined.

    Attributes:
        per_node: GPUs of a node.
        inside: bytes per second that a GPU sends inside of its node.
        between: the same to other nodes, through its share of the node's network cards.
        latency: seconds of a collective of two ranks, and per doubling of their number.
    """

    per_node: int
    inside: float
    between: float
    latency: float = 15e-6

    def seconds(self, volume: float, world: int, calls: float) -> float:
        """Time of collectives.

        Rings pass (world - 1) / world of the whole through every GPU, and through the boundary of every node, where
        they share all of its network cards; the slower of the two decides.

        Args:
            volume: bytes of the whole tensors, all calls together.
            world: ranks.
            calls: number of collectives.
        """
        if world == 1:
            return 0.0
        slowest = self.inside if world <= self.per_node else min(self.inside, self.between * self.per_node)
        return volume * (world - 1) / world / slowest + calls * self.latency * math.log2(world)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and the bytes each rank receives in it.

    Attributes:
        compute: of the micro-batches.
        gathers: of ZeRO-3's weights, before any overlap.
        reduction: of the adapter's gradients and values.
        offload: of what moves to the host and back, and of the optimizer there.
        exposed: of the communication that nothing hides.
        received: bytes, by what they are.
    """

    compute: float
    gathers: float
    reduction: float
    offload: float
    exposed: float
    received: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.offload + self.exposed


def compute_seconds(kernels: float, flops: float, traffic: float, speed: Speed) -> float:
    """Time of one micro-batch on one device.

    Products are bound by arithmetic and everything else by memory, so the two times are added; a host that cannot
    launch kernels as fast as the device ends them sets the pace instead.
    """
    device = flops / speed.flops + traffic / speed.bandwidth + kernels * speed.kernel
    return max(device, kernels * speed.launch)


def step_time(
    micro_seconds: float, accumulation: int, parameters: Inventory, workload: Workload, setting: Setting, links: Links
) -> StepTime:
    """Time of one optimizer step.

    A frozen weight is gathered twice per micro-batch (forward, backward; what a checkpointed layer recomputes is still
    there) and has no gradient to reduce; with a copy inside the node (hpZ) it comes from there. The adapter's gradients
    are reduced, and its values gathered, once per step (ZeRO-3: reduced per micro-batch).
    """
    volumes = received(parameters, workload, setting, accumulation)
    world, sharing = setting.world, setting.sharing
    gathered = _is_gathered(parameters, setting)
    calls = 2.0 * accumulation * float(gathered.sum())
    gathers = links.seconds(volumes["weights"], sharing, calls)
    reduction = links.seconds(volumes["adapter"], world, 2.0)
    compute = micro_seconds * accumulation
    hidden = min(compute, OVERLAP * gathers)
    of_whole = {"weights": (sharing - 1) / sharing, "adapter": (world - 1) / world}
    mine = {name: volume * of_whole[name] for name, volume in volumes.items()}
    offload = _offload_seconds(volumes["weights"], parameters, workload, setting)
    return StepTime(compute, gathers, reduction, offload, gathers - hidden + reduction, mine)


def received(parameters: Inventory, workload: Workload, setting: Setting, accumulation: int) -> Mapping[str, float]:
    """Bytes of the whole tensors that collectives carry in one optimizer step: frozen weights, and the adapter.

    With `zero_quantized_weights` (qwZ) weights travel as one byte a value; their scales are left out.
    """
    frozen = frozen_bytes(parameters, workload, setting.quantization)
    gathered = frozen[_is_gathered(parameters, setting)]
    if setting.zero.get("zero_quantized_weights"):
        gathered = gathered / workload.dtype.itemsize
    size = workload.adapter_dtype.itemsize
    reductions = accumulation if setting.stage >= 2 else 1
    adapter = parameters.num_trainable * size * (reductions + 1.0)
    return {"weights": 2.0 * accumulation * float(gathered.sum()), "adapter": adapter}


def _offload_seconds(gathered: float, parameters: Inventory, workload: Workload, setting: Setting) -> float:
    """What offloading adds: a rank's part of each gather comes from the host; gradients go there, values come back."""
    seconds = 0.0
    if setting.offloads("offload_param"):
        seconds += gathered / setting.world / HOST_LINK
    if setting.offloads("offload_optimizer"):
        values = parameters.num_trainable / setting.world
        seconds += values * (4.0 + workload.adapter_dtype.itemsize) / HOST_LINK + values / HOST_ADAM
    return seconds


def _is_gathered(parameters: Inventory, setting: Setting) -> np.ndarray:
    if setting.stage < 3:
        return np.zeros(len(parameters.frozen), dtype=bool)
    threshold = float(setting.zero.get("stage3_param_persistence_threshold", 1e5))
    return np.asarray(parameters.frozen > threshold)
