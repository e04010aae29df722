"""Prompts that were trained by PEFT's methods, read from their runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from more_ds.errors import UserError
from more_ds.loading import find_subject, read_weights

PROMPT = "prompt_embeddings"
"""PEFT's name of a prompt in an adapter's file."""


def read_prompts(names: Sequence[str], length: int) -> tuple[Tensor, list[str]]:
    """The prompts of runs or adapter folders, (number, length, width), and the names of their base models.

    Raises:
        UserError: one holds no prompt of this length, or of another width than the others.
    """
    prompts: list[Tensor] = []
    bases = []
    for name in names:
        subject = find_subject(name)
        tensors = {} if subject.adapter is None else read_weights(subject.adapter)
        if PROMPT not in tensors or len(tensors[PROMPT]) != length:
            found = f"a prompt of {len(tensors[PROMPT])} vectors" if PROMPT in tensors else "no prompt"
            raise UserError(f"{name} holds {found}; a run of prompt_tuning with {length} vectors is needed")
        if prompts and tensors[PROMPT].shape != prompts[0].shape:
            raise UserError(f"{name} and {names[0]} hold prompts of different widths, so of different base models")
        prompts.append(tensors[PROMPT])
        bases.append(subject.base)
    return torch.stack(prompts), bases
