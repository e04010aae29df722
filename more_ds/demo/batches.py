"""Micro-batches of the demo's documents for pretraining: whole ones for LLaMA, with something left out for T5.

No document is cut, and those of a batch are of like length: in this language a document's end says what follows from
the rest of it, and padding costs time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from more_ds.demo.text import documents
from more_ds.demo.tokenizer import SENTINELS
from more_ds.losses import IGNORED
from more_ds.pretrain.spans import Batch, corrupt, pad_rows, seq2seq_batch
from more_ds.pretrain.tokenizer import Kind

DOCUMENTS = 32
"""Documents in a batch."""
SORTED = 16
"""Batches whose documents are sorted by length together."""
CONTINUED, MENDED = 0.3, 0.2
"""Shares of T5's batches in which documents are to be continued, and mended; in the others, gaps are to be filled."""


def batches(kind: Kind, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Batch]:
    """Yield padded batches of documents without end.

    LLaMA's are documents between BOS and EOS, padded behind, where causal attention never looks: they need no mask.
    T5's are pairs of texts, see `seq2seq_batch`: with gaps (Raffel et al., 2020), with the end left out (the "LM
    adaptation" of T5 1.1), or with faults (as BART's): gaps teach the encoder to compare sentences, ends are like the
    tasks' answers, and faults say that the order of words matters.

    Args:
        kind: of the model.
        tokenizer: of the documents.
        seed: of the documents, and of what is left out.
    """
    rng = random.Random(seed)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    sentinels = [vocabulary[f"<extra_id_{i}>"] for i in range(SENTINELS)] if kind == "t5" else []
    for rows in _alike(tokenizer, seed, rng):
        if kind == "llama":
            inputs = pad_rows([[tokenizer.bos_token_id, *row, eos] for row in rows], pad)
            yield {"input_ids": inputs, "labels": inputs.masked_fill(inputs == pad, IGNORED)}
            continue
        asked = rng.choices(("continue", "mend", "fill"), (CONTINUED, MENDED, 1 - CONTINUED - MENDED))[0]
        if asked == "continue":
            pairs = without_ends(rows, rng)
        elif asked == "mend":
            pairs = [(with_faults(row, rng), row) for row in rows]
        else:
            pairs = [corrupt(row, gaps(len(row), rng), sentinels) for row in rows]
        yield seq2seq_batch(pairs, pad, eos)


def without_ends(rows: Sequence[list[int]], rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """Cut as many ids off the end of every row, a few half of the time; return what stays and what was cut off."""
    shortest = min(map(len, rows))
    cut = rng.randrange(1, shortest) if rng.random() < 0.5 else min(rng.choice((3, 4, 5, 6, 7)), shortest - 1)
    return [(row[:-cut], row[-cut:]) for row in rows]


def with_faults(row: Sequence[int], rng: random.Random) -> list[int]:
    """Swap two neighbours, drop an id or say one twice, once for every ten ids; at least once."""
    found = list(row)
    for _ in range(max(1, len(row) // 10)):
        at = rng.randrange(len(found) - 1)
        fault = rng.choice(("swap", "drop", "twice"))
        if fault == "swap":
            found[at], found[at + 1] = found[at + 1], found[at]
        elif fault == "drop":
            del found[at]
        else:
            found.insert(at, found[at])
    return found


def gaps(length: int, rng: random.Random) -> list[bool]:
    """Choose which of `length` ids to hide: words, pairs, and half of the time the end; never all, never none."""
    hidden = [False] * length
    for _ in range(min(max(1, length // 5), SENTINELS // 2)):
        start = rng.randrange(length)
        for at in range(start, min(start + rng.choice((1, 1, 2)), length)):
            hidden[at] = True
    if rng.random() < 0.5:
        for at in range(max(length - rng.choice((2, 3, 4)), 1), length):
            hidden[at] = True
    hidden[0] = False
    if not any(hidden):
        hidden[-1] = True
    return hidden


def _alike(tokenizer: PreTrainedTokenizerBase, seed: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Yield the ids of `DOCUMENTS` documents of like length at a time."""
    stream = documents(seed)
    while True:
        texts = list(islice(stream, SORTED * DOCUMENTS))
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        found = [rows[at : at + DOCUMENTS] for at in range(0, len(rows), DOCUMENTS)]
        rng.shuffle(found)
        yield from found
