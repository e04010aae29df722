"""Closed answers packed beside their prompt, so that one forward pass scores them all.

The answers of one example are a tree: its root is the prompt, a token that several answers share stands in it once,
and every token sees the prompt and its own ancestors alone. Laid out as one row, with a mask that says who sees whom
and the positions that the tokens would have after the prompt, all answers cost their distinct tokens, in the same
pass as the prompt: the 26 answers of STS-B take 38 tokens instead of 26 passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """The answers of one example as one row of tokens.

    Attributes:
        tokens: the tokens that something follows, (nodes,); the last token of an answer is only ever predicted.
        depths: (nodes,) how many tokens stand between the root and the token, from 0.
        sees: (nodes, nodes) whether the row's token sees the column's: its ancestors and itself.
        reads: for every answer, for each of its tokens, the node that predicts it; -1 is the end of the prompt.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    sees: Tensor
    reads: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def tree(answers: tuple[Answer, ...], start: int | None = None) -> Tree:
    """Pack answers.

    Args:
        answers: token ids, one or more each.
        start: the first token of a decoder, which becomes the root; None: the prompt's last token is the root.
    """
    tokens: list[int] = [] if start is None else [start]
    parents: list[int] = [-1] * len(tokens)
    root = len(tokens) - 1
    children: dict[tuple[int, int], int] = {}
    reads = []
    for answer in answers:
        node, own = root, []
        for i, token in enumerate(answer):
            own.append(node)
            if i == len(answer) - 1:
                break
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = children[node, token]
        reads.append(tuple(own))
    depths: list[int] = []
    sees = torch.eye(len(tokens), dtype=torch.bool)
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        if parent >= 0:
            sees[node] |= sees[parent]
    return Tree(tuple(tokens), tuple(depths), sees, tuple(reads))


def split(answers: Sequence[Answer], limit: int) -> list[tuple[int, ...]]:
    """Group answers, by their numbers, so that no group has more than `limit` tokens (or it is a single answer)."""
    groups: list[list[int]] = [[]]
    room = limit
    for i, answer in enumerate(answers):
        if groups[-1] and len(answer) > room:
            groups.append([])
            room = limit
        groups[-1].append(i)
        room -= len(answer)
    return [tuple(group) for group in groups]


def rows(trees: Sequence[Tree], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trees as a batch: tokens and depths, (batch, nodes) padded on the right, and sees, (batch, nodes, nodes).

    A padding token sees itself alone, and nothing sees it.
    """
    width = max(len(t.tokens) for t in trees)
    tokens = torch.full((len(trees), width), pad_id)
    depths = torch.zeros_like(tokens)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for i, own in enumerate(trees):
        count = len(own.tokens)
        tokens[i, :count] = torch.tensor(own.tokens, dtype=torch.long)
        depths[i, :count] = torch.tensor(own.depths, dtype=torch.long)
        sees[i, :count, :count] = own.sees
    return tokens, depths, sees


def beside_prompts(prompt_mask: Tensor, sees: Tensor) -> Tensor:
    """Who sees whom in rows of a prompt and its tree, (batch, length + nodes, length + nodes) bool.

    Args:
        prompt_mask: (batch, length) 1 at real tokens.
        sees: (batch, nodes, nodes), from `rows`.
    """
    length, nodes = prompt_mask.shape[1], sees.shape[1]
    whole = torch.eye(length + nodes, dtype=torch.bool, device=sees.device).repeat(len(sees), 1, 1)
    real = prompt_mask.bool().unsqueeze(1)
    whole[:, :length, :length] |= real & torch.ones(length, length, dtype=torch.bool, device=sees.device).tril()
    whole[:, length:, :length] = real
    whole[:, length:, length:] = sees
    return whole


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form that attention adds to its scores: (batch, 1, queries, keys)."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
