"""A tiny backbone, pretrained on the unlabelled text of the demo language.

A plain PyTorch loop: its cost is bounded by steps, not by the clock, and it computes with one thread, so that the same
machine makes the same weights each time, whatever else runs on it and however many ranks wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch.optim import Adafactor, AdamW, Optimizer
from transformers import PreTrainedModel

from more_ds.demo.batches import batches
from more_ds.demo.lexicon import GLOSSARY
from more_ds.demo.text import documents
from more_ds.demo.tokenizer import train_tokenizer
from more_ds.log import Progress
from more_ds.pretrain.shapes import Sizes, llama, t5
from more_ds.pretrain.spans import Batch
from more_ds.pretrain.tokenizer import Kind

STEPS = {"llama": 650, "t5": 600}
TEXT_SEED = 17
SIZES = {"llama": Sizes(128, 256, layers=4, heads=4), "t5": Sizes(128, 256, layers=3, heads=4)}
PEAK_LR = {"llama": 2e-3, "t5": 2e-2}
WARMUP_STEPS = 50


def build_backbone(kind: Kind, folder: Path, steps: int | None = None) -> None:
    """Train a tokeniser and a backbone for `steps` steps, and save both in `folder`.

    `folder` then loads with `AutoTokenizer`, and `AutoModelForCausalLM` ("llama") or
    `AutoModelForSeq2SeqLM` ("t5"). `pretraining.log` in it has the loss as it fell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sample = [*islice(documents(TEXT_SEED), 6000), *GLOSSARY]
    tokenizer = train_tokenizer(kind, sample, folder)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        model = (llama if kind == "llama" else t5)(tokenizer, SIZES[kind])
        stream = batches(kind, tokenizer, TEXT_SEED)
        lines = _pretrain(model, optimizer(kind, model), stream, STEPS[kind] if steps is None else steps)
    model.eval()
    model.save_pretrained(folder)
    (folder / "pretraining.log").write_text("\n".join(lines) + "\n")


def optimizer(kind: Kind, model: PreTrainedModel) -> Optimizer:
    """AdamW for LLaMA, Adafactor for T5, as they were trained.

    T5's weights begin at scales from 0.016 (queries) to 1 (embeddings), and Adafactor's steps are shares of a weight's
    scale. AdamW's are of one size: after 400 of them T5's loss is where Adafactor has it after 150.
    """
    if kind == "t5":
        return Adafactor(model.parameters(), lr=PEAK_LR[kind])
    return AdamW(model.parameters(), lr=PEAK_LR[kind], betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def _pretrain(model: PreTrainedModel, optimizer: Optimizer, stream: Iterator[Batch], steps: int) -> list[str]:
    """Run `steps` steps with warm-up and cosine decay; return the log's lines."""
    warmup = min(WARMUP_STEPS, steps)
    peak = optimizer.param_groups[0]["lr"]
    model.train()
    lines, mean = [], math.nan
    with Progress(steps, "pretraining the demo's backbone") as bar:
        for step in range(1, steps + 1):
            done = max(step - warmup, 0) / max(steps - warmup, 1)
            scale = min(step / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            loss = model(**next(stream)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
            bar.advance(note=f"loss {mean:.2f}")
            if step % 25 == 0 or step == steps:
                lines.append(f"step {step} of {steps}, loss {mean:.4f}")
    return lines


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread inside; so narrow a model hardly gains from two, and loses much where others compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
