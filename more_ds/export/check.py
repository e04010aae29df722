"""That an export computes what the trained adapter computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from more_ds.errors import TrainingError
from more_ds.model import auto_class
from more_ds.quantised import with_weights
from more_ds.text_model import TextModel

ROWS, LENGTH, SEED = 4, 24, 0
"""Of the random token ids on which the logits are compared."""
TOLERANCE = 1e-4
"""Largest difference of two logits that passes in float32, relative to the largest logit."""


def reference_logits(text_model: TextModel, task_ids: Mapping[str, int]) -> dict[str, Tensor]:
    """The trained adapter's logits for every task, (rows, length, vocabulary) float32 on the CPU."""
    found = {}
    for name, task in task_ids.items():
        extra = {"task_ids": torch.full((ROWS,), task, device=text_model.device)} if text_model.routes_by_task else {}
        found[name] = _logits(text_model.peft, text_model.config, text_model.device, extra)
    return found


def lora_difference(base: nn.Module, folder: Path, expected: Tensor) -> float:
    """Load an exported LoRA with stock PEFT, compare, and take it off again; the difference as of `compare`."""
    model: Any = PeftModel.from_pretrained(base, str(folder), torch_device="cpu").eval()
    try:
        return compare(_logits(model, model.get_base_model().config, next(base.parameters()).device, {}), expected)
    finally:
        with with_weights(model):
            model.unload()


def merged_difference(folder: Path, config: Any, expected: Tensor) -> float:
    """Load a merged model and compare; the difference as of `compare`."""
    model = auto_class(config).from_pretrained(str(folder), dtype=torch.float32).eval()
    return compare(_logits(model, model.config, torch.device("cpu"), {}), expected)


def compare(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def refuse_different(differences: Mapping[str, float]) -> None:
    """Refuse an export that computes something else.

    Raises:
        TrainingError: naming the worst task.
    """
    worst = max(differences, key=differences.__getitem__)
    if not differences[worst] <= TOLERANCE:
        raise TrainingError(
            f"the export of task '{worst}' differs from the adapter: its logits by {differences[worst]:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; nothing was put in place; is this the base model that was trained on?"
        )


@torch.no_grad()
def _logits(model: nn.Module, config: Any, device: torch.device, extra: dict[str, Tensor]) -> Tensor:
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model(**inputs, **extra, use_cache=False).logits.float().cpu()
