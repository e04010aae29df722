"""A tiny backbone, pretrained on the unlabelled text of the demo language.

A plain PyTorch loop: its cost is bounded by steps, not by the clock, so that the same machine
makes the same weights each time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from more_ds.demo.lexicon import GLOSSARY
from more_ds.demo.spans import SpanCorruption
from more_ds.demo.text import documents
from more_ds.demo.tokenizer import train_tokenizer
from more_ds.log import Progress
from more_ds.losses import IGNORED
from more_ds.pretrain.shapes import Sizes, llama, t5
from more_ds.pretrain.spans import Batch, pad_rows
from more_ds.pretrain.tokenizer import Kind

STEPS = {"llama": 900, "t5": 500}
TEXT_SEED = 17
SIZES = {"llama": Sizes(128, 256, layers=4, heads=4), "t5": Sizes(128, 256, layers=3, heads=4)}
DOCUMENTS = 32
"""Documents in a batch."""
PEAK_LR = 2e-3
WARMUP_STEPS = 50


def build_backbone(kind: Kind, folder: Path, steps: int | None = None) -> None:
    """Train a tokeniser and a backbone for `steps` steps, and save both in `folder`.

    `folder` then loads with `AutoTokenizer`, and `AutoModelForCausalLM` ("llama") or
    `AutoModelForSeq2SeqLM` ("t5"). `pretraining.log` in it has the loss as it fell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sample = [*islice(documents(TEXT_SEED), 6000), *GLOSSARY]
    tokenizer = train_tokenizer(kind, sample, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (llama if kind == "llama" else t5)(tokenizer, SIZES[kind])
        batches = (
            whole_documents(tokenizer) if kind == "llama" else SpanCorruption(tokenizer, TEXT_SEED, DOCUMENTS).batches()
        )
        lines = _pretrain(model, batches, STEPS[kind] if steps is None else steps)
    model.eval()
    model.save_pretrained(folder)
    (folder / "pretraining.log").write_text("\n".join(lines) + "\n")


def _pretrain(model: PreTrainedModel, batches: Iterator[Batch], steps: int) -> list[str]:
    """Run `steps` steps of AdamW with warm-up and cosine decay; return the log's lines."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(WARMUP_STEPS, steps)
    model.train()
    lines, mean = [], math.nan
    with Progress(steps, "pretraining the demo's backbone") as bar:
        for step in range(1, steps + 1):
            done = max(step - warmup, 0) / max(steps - warmup, 1)
            scale = min(step / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * scale
            loss = model(**next(batches)).loss
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


def whole_documents(tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Yield batches of whole documents between BOS and EOS, of like length, padded at the end.

    No document is cut: in this language its end says what follows from the rest of it. Causal
    attention never looks at padding behind a token, so no mask is needed.
    """
    stream = documents(TEXT_SEED)
    rng = random.Random(TEXT_SEED)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        encoded = tokenizer(list(islice(stream, 16 * DOCUMENTS)))["input_ids"]
        rows = sorted(([*ids, eos] for ids in encoded), key=len)
        batches = [rows[at : at + DOCUMENTS] for at in range(0, len(rows), DOCUMENTS)]
        rng.shuffle(batches)
        for batch in batches:
            inputs = pad_rows(batch, pad)
            yield {"input_ids": inputs, "labels": inputs.masked_fill(inputs == pad, IGNORED)}
