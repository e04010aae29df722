"""Where the time of a training step goes: the operations of some variants side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from more_ds.speed.counting import without_stderr
from more_ds.speed.rounds import synchronise
from more_ds.speed.steps import Setting, step_of

BETWEEN = "between operations"
"""Python, autograd's own work, and waiting: what is left of a step without its operations."""


@dataclass(frozen=True)
class Operation:
    """One kind of operation in a step.

    Attributes:
        milliseconds: in the operation itself, without what it calls; on a GPU, the device's.
        calls: of it.
    """

    milliseconds: float = 0.0
    calls: float = 0.0


def step_profile(setting: Setting, names: Sequence[str], *, steps: int = 5) -> dict[str, dict[str, Operation]]:
    """Profile training steps.

    The profiler itself takes time at each operation, which counts as `BETWEEN`: what is compared are variants under
    it, and for their ratio there is `step_costs`.

    Args:
        setting: model, micro-batch, rank.
        names: of `more_ds.speed.steps.variants()`.
        steps: what is given is a mean over so many.

    Returns:
        By variant and by the operation's name, of one step.
    """
    return {name: _profiled(setting, name, steps) for name in names}


def largest_differences(
    found: Mapping[str, Mapping[str, Operation]], reference: str, name: str, count: int
) -> list[str]:
    """Names of the operations in which a variant's time differs most from the reference's, the costliest first."""
    difference = {key: own.milliseconds for key, own in found[name].items()}
    for key, own in found[reference].items():
        difference[key] = difference.get(key, 0.0) - own.milliseconds
    chosen = sorted(difference, key=lambda key: -abs(difference[key]))[:count]
    return sorted(chosen, key=lambda key: -difference[key])


def _profiled(setting: Setting, name: str, steps: int) -> dict[str, Operation]:
    step = step_of(setting, name)[0]
    for _ in range(2):
        step()
    synchronise()
    on_device = setting.device.startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with without_stderr(), profile(activities=kinds) as seen:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise()
        whole = (time.perf_counter() - began) * 1e3 / steps
    found = {}
    for event in seen.key_averages():
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        found[event.key] = Operation(own / 1e3 / steps, event.count / steps)
    return found | {BETWEEN: Operation(whole - sum(own.milliseconds for own in found.values()))}
