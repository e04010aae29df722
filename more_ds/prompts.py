"""Prompts that were trained by PEFT's methods: read from their runs, and compared.

Source of the comparison: "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer" (ACL 2022), section 3: a
prompt trained briefly on a task stands for the task, and the prompt of the nearest one is the best to start from. Of
the paper's two measures it is the one by pairs of vectors, which tells more there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from more_ds import log
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


def likeness(prompt: Tensor, others: Tensor) -> Tensor:
    """How like other prompts are to one: the mean cosine of all pairs of vectors, in -1 to 1.

    Args:
        prompt: (l, d)
        others: (number, l, d)

    Returns:
        (number,)
    """
    return torch.einsum("id,njd->n", F.normalize(prompt, dim=-1), F.normalize(others, dim=-1)) / len(prompt) ** 2


def most_alike(like: str, names: Sequence[str], length: int) -> str:
    """The run of several whose prompt is most like that of `like`; all are said, the nearest first.

    Raises:
        UserError: as `read_prompts`.
    """
    prompts, _ = read_prompts([like, *names], length)
    measured = likeness(prompts[0].double(), prompts[1:].double()).tolist()
    order = sorted(range(len(names)), key=lambda i: -measured[i])
    log.say(f"likeness to {like}: {', '.join(f'{names[i]} {measured[i]:.3f}' for i in order)}; the first is taken")
    return names[order[0]]
