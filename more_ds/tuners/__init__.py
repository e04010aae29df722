"""Fine-tuning methods: one file per method, each a PEFT tuner registered with PEFT on import."""

from __future__ import annotations

from more_ds.tuners.more import MoreConfig, MoreModel

__all__ = ["MoreConfig", "MoreModel"]
