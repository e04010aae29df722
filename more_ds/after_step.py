"""What a method does between two optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from more_ds.optimizer_state import MASTER, NamedState
from more_ds.tuners.smora import SMoRA
from more_ds.tuners.sora import SoRA


def after_step(engine: Any) -> None:
    """Let the method follow an optimizer step: SoRA's proximal step, SMoRA's balance. Collective.

    Args:
        engine: of `more_ds.engine.start`, at any ZeRO stage.
    """
    modules = list(engine.module.modules())
    gated = {str(i): m for i, m in enumerate(m for m in modules if isinstance(m, SoRA) and m.g.requires_grad)}
    if gated:
        numbers = NamedState(engine, {name: module.g for name, module in gated.items()})
        values = numbers.gather(MASTER)
        numbers.set(MASTER, {name: module.proximal(values[name]) for name, module in gated.items()})
    routed = [m for m in modules if isinstance(m, SMoRA)]
    if routed:
        used = torch.cat([module.used for module in routed])
        dist.all_reduce(used)
        for module, own in zip(routed, used.split([len(m.used) for m in routed]), strict=True):
            module.balance(own)
