"""Models of random weights whose steps are timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from more_ds.data.collate import Batch, Collator
from more_ds.errors import UserError, suggest
from more_ds.model import auto_class
from more_ds.planner.hardware import shapes

_COMMON = {"vocab_size": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama(width: int, layers: int) -> dict[str, Any]:
    inner = width * 8 // 3 // 16 * 16
    return _COMMON | {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": max(4, width // 64), "max_position_embeddings": 4096,
    }  # fmt: skip


def _t5(width: int, layers: int) -> dict[str, Any]:
    return _COMMON | {
        "model_type": "t5", "d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": layers,
        "num_heads": max(2, width // 64), "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model's shape and a micro-batch's.

    Attributes:
        config: of the model, for `AutoConfig.for_model`.
        rows: examples of a micro-batch.
        length: tokens of each, prompt and answer.
    """

    config: dict[str, Any]
    rows: int
    length: int


SHAPES = {
    "llama-256": Shape(_llama(256, 4), 4, 128),
    "llama-512": Shape(_llama(512, 3), 4, 128),
    "llama-128-launch": Shape(_llama(128, 12), 4, 16),
    "t5-256": Shape(_t5(256, 3), 4, 128),
    "t5-512": Shape(_t5(512, 2), 4, 128),
    "t5-128-launch": Shape(_t5(128, 6), 4, 16),
}
"""Small shapes: `launch` ones have so few tokens that sending kernels, not computing, takes the time."""
ANSWER = 4


def find_shape(name: str) -> Shape:
    """A shape by its name: one of `SHAPES`, or the hub id of a model whose shape is known offline.

    Raises:
        UserError: neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    short = {hub.rsplit("/", 1)[-1].lower().removesuffix("-hf").replace("llama-2", "llama2"): hub for hub in shapes()}
    hub = short.get(name.lower(), name)
    if hub not in shapes():
        raise UserError(f"unknown shape '{name}'{suggest(name, [*SHAPES, *short])}")
    return Shape(shapes()[hub]["config"], 8, 512)


def build(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """The model with random weights, the same every time."""
    config = AutoConfig.for_model(**shape.config)
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class(config).from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def batch(shape: Shape, device: str, tasks: int, task: int = 0) -> Batch:
    """A full micro-batch of one task: random prompts, answers of `ANSWER` tokens."""
    draw = torch.Generator().manual_seed(1)
    seq2seq = shape.config["model_type"] == "t5"
    words = torch.randint(3, shape.config["vocab_size"], (shape.rows, shape.length), generator=draw).tolist()
    prompts = words if seq2seq else [row[:-ANSWER] for row in words]
    collator = Collator(0, 0 if seq2seq else None)
    made = collator.answers(prompts, [row[-ANSWER:] for row in words], [task % tasks] * shape.rows)
    return {name: tensor.to(device) for name, tensor in made.items()}
