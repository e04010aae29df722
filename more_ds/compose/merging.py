"""Arithmetic on LoRAs, by PEFT's `add_weighted_adapter`: what needs no data and no training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from more_ds.compose.sources import Source, aligned
from more_ds.errors import UserError
from more_ds.export.lora import write_lora

KINDS = {"cat": "cat", "linear": "linear", "ties": "ties", "dare": "dare_linear"}
"""Our names -> PEFT's. `cat` is the weighted sum of the updates, exactly, at the sum of the ranks; the others work on
A's and B's apart, at the rank of one: `linear` their sums, `ties` those of the largest values of the prevailing sign,
`dare` those of values drawn at random."""
MERGED = "merged"


def merge(
    base: nn.Module, sources: Sequence[Source], kind: str, weights: Sequence[float], density: float, seed: int, to: Path
) -> None:
    """Write the merged LoRA into a folder that exists.

    Args:
        base: the base model; it is left with the LoRAs attached.
        sources: LoRAs of this base model.
        kind: one of `KINDS`.
        weights: of each.
        density: share of the values that `ties` and `dare` keep.
        seed: of the values that `dare` draws.
        to: the folder.

    Raises:
        UserError: the LoRAs do not fit the model.
    """
    torch.manual_seed(seed)
    names = [f"lora{i}" for i in range(len(sources))]
    with tempfile.TemporaryDirectory() as scratch:
        model: Any = None
        for name, source, factors in zip(names, sources, aligned(sources), strict=True):
            folder = Path(scratch, name)
            folder.mkdir()
            write_lora(folder, factors, source.config, base=source.base, dtype=torch.float32)
            try:
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), adapter_name=name, torch_device="cpu")
                else:
                    model.load_adapter(str(folder), adapter_name=name, torch_device="cpu")
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{source.name} does not fit the model: {reason}") from error
        further = {"density": density} if kind in ("ties", "dare") else {}
        model.add_weighted_adapter(names, list(weights), MERGED, combination_type=KINDS[kind], **further)
        model.save_pretrained(scratch, selected_adapters=[MERGED])
        for name in (ADAPTER, ADAPTER_CONFIG):
            shutil.copyfile(Path(scratch, MERGED, name), to / name)
