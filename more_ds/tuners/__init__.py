"""Fine-tuning methods: one file per method, each a PEFT tuner registered with PEFT on import."""

from __future__ import annotations

from more_ds.tuners.attempt import AttemptConfig
from more_ds.tuners.bitfit import BitFitConfig
from more_ds.tuners.dylora import DyLoraConfig
from more_ds.tuners.full import FullConfig
from more_ds.tuners.houlsby import HoulsbyConfig
from more_ds.tuners.hydralora import HydraLoraConfig
from more_ds.tuners.hyperformer import HyperFormerConfig
from more_ds.tuners.mixlora import MixLoraConfig
from more_ds.tuners.moelora import MoeLoraConfig
from more_ds.tuners.mole import MoleConfig
from more_ds.tuners.more import MoreConfig, MoreModel
from more_ds.tuners.mtl_lora import MtlLoraConfig
from more_ds.tuners.multilora import MultiLoraConfig
from more_ds.tuners.smora import SMoRAConfig
from more_ds.tuners.sora import SoRAConfig
from more_ds.tuners.xlora import XLoraConfig

__all__ = [
    "AttemptConfig",
    "BitFitConfig",
    "DyLoraConfig",
    "FullConfig",
    "HoulsbyConfig",
    "HydraLoraConfig",
    "HyperFormerConfig",
    "MixLoraConfig",
    "MoeLoraConfig",
    "MoleConfig",
    "MoreConfig",
    "MoreModel",
    "MtlLoraConfig",
    "MultiLoraConfig",
    "SMoRAConfig",
    "SoRAConfig",
    "XLoraConfig",
]
