"""Answering rows of several tasks in one batch with MoRE's table of ranks, against one LoRA that is not merged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from more_ds.methods import adapter_config
from more_ds.model import attach
from more_ds.speed.rounds import Ratio, compare
from more_ds.speed.shapes import build
from more_ds.speed.steps import REFERENCE, Setting

BASE, MIXED, SINGLE = "base", "more, mixed tasks", "more, one task"
NEW_TOKENS = 32
"""Of `decode`, after a prompt of `SHORT` tokens; `prefill` reads a whole prompt and writes one."""
SHORT = 4


def inference_speed(setting: Setting, *, rounds: int) -> dict[str, dict[str, Ratio]]:
    """Time `generate` in rounds: the ratio to PEFT's LoRA by part (`prefill`, `decode`) and variant.

    Weights are random, and so are the ranks; every text has the same length, whatever a model writes.

    Args:
        setting: model, batch, rank and tasks.
        rounds: see `more_ds.speed.rounds.compare`.
    """
    models = {name: model_of(setting, name) for name in (REFERENCE, BASE, MIXED, SINGLE)}
    parts = {"prefill": (setting.shape.length, 1), "decode": (SHORT, NEW_TOKENS)}
    found = {}
    for part, (length, written) in parts.items():
        variants = {name: work(setting, name, model, length, written) for name, model in models.items()}
        for run in variants.values():
            run()
        found[part] = compare(variants, REFERENCE, rounds=rounds)
    return found


def model_of(setting: Setting, name: str) -> Any:
    """The model of a variant, in evaluation mode."""
    base = build(setting.shape, setting.dtype, setting.device).eval()
    if name == BASE:
        return base
    # An adapter that changes nothing takes as long as one that does.
    options: dict[str, Any] = {"r": setting.rank, "lora_alpha": 32, "target_modules": "all-linear"}
    method = "lora"
    if name != REFERENCE:
        method, options = "more", options | {"gate": "table", "contrastive_weight": 0.0}
    tasks = [f"task {i}" for i in range(setting.tasks)]
    model: Any = attach(base, adapter_config(method, options, tasks, base.config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    draw = torch.Generator().manual_seed(0)
    for key, buffer in model.named_buffers():
        if "more_ranks" in key:
            buffer.copy_(torch.randint(1, setting.rank + 1, buffer.shape, generator=draw))
    return model.requires_grad_(False).eval()


def work(setting: Setting, name: str, model: Any, length: int, written: int) -> Callable[[], object]:
    """Writing `written` tokens after prompts of `length`, by a variant's model."""
    shape, draw = setting.shape, torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.config["vocab_size"], (shape.rows, length), generator=draw).to(setting.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in (MIXED, SINGLE):
        step = 1 if name == MIXED else 0
        inputs["task_ids"] = torch.arange(shape.rows, device=setting.device) * step % setting.tasks
    settings = GenerationConfig(
        do_sample=False, min_new_tokens=written, max_new_tokens=written, use_cache=True, pad_token_id=0,
        eos_token_id=shape.config["eos_token_id"], decoder_start_token_id=0,
    )  # fmt: skip
    return partial(model.generate, **inputs, generation_config=settings)
