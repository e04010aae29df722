"""The model of a run that trained all of it, as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from more_ds.checkpoint_files import ADAPTER
from more_ds.export.merged import WEIGHTS
from more_ds.model import DTYPES


def write_model(checkpoint: Path, folder: Path, model: Any, dtype: str, tokenizer: Any) -> None:
    """Write what `from_pretrained` reads: weights, configuration, generation settings and tokeniser.

    Args:
        checkpoint: folder with the trained tensors under the model's own names, in float32.
        folder: where; it exists.
        model: the Hugging Face model they are of; its weights are not read.
        dtype: `fp32`, `bf16` or `fp16`: what the run computes in.
        tokenizer: of the base model.
    """
    tensors = load_file(checkpoint / ADAPTER)
    tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.use_cache, config.dtype = True, DTYPES[dtype]
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
