"""What a method does between two optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, PeftModel

from more_ds.optimizer_state import MASTER, NamedState
from more_ds.tuners.adalora import Budget
from more_ds.tuners.smora import SMoRA
from more_ds.tuners.sora import SoRA


class AfterStep:
    """What follows an optimizer step: SoRA's proximal step, SMoRA's balance, AdaLoRA's budget; else nothing."""

    def __init__(self, engine: Any) -> None:
        """Look for the modules that it concerns, once.

        Args:
            engine: of `more_ds.engine.start`, at any ZeRO stage.
        """
        modules = list(engine.module.modules())
        self.engine = engine
        self._gated = {str(i): m for i, m in enumerate(m for m in modules if isinstance(m, SoRA) and m.g.requires_grad)}
        self._routed = [m for m in modules if isinstance(m, SMoRA)]
        self._budget: Budget | None = None
        if isinstance(engine.module, PeftModel) and isinstance(engine.module.active_peft_config, AdaLoraConfig):
            self._budget = Budget(engine.module)
            engine.module.base_model.budget = self._budget

    def __call__(self, step: int) -> None:
        """Follow step `step`, counted from 1. Collective."""
        if self._budget is not None:
            self._budget.follow(self.engine, step)
        if self._gated:
            numbers = NamedState(self.engine, {name: module.g for name, module in self._gated.items()})
            values = numbers.gather(MASTER)
            numbers.set(MASTER, {name: module.proximal(values[name]) for name, module in self._gated.items()})
        if self._routed:
            used = torch.cat([module.used for module in self._routed])
            dist.all_reduce(used)
            for module, own in zip(self._routed, used.split([len(m.used) for m in self._routed]), strict=True):
                module.balance(own)
