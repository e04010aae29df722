"""Answers as a tree beside their prompt, by hand."""

from __future__ import annotations

import torch

from more_ds.scoring.answer_tree import additive, beside_prompts, rows, split, tree

ANSWERS = ((5, 6, 9), (5, 7, 9), (8, 9), (9,))


def test_shared_tokens_stand_once_and_the_last_ones_not_at_all() -> None:
    own = tree(ANSWERS)
    assert own.tokens == (5, 6, 7, 8)
    assert own.depths == (0, 1, 1, 0)
    assert own.sees.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert own.reads == ((-1, 0, 1), (-1, 0, 2), (-1, 3), (-1,))


def test_a_decoders_first_token_is_the_root() -> None:
    own = tree(ANSWERS, start=0)
    assert own.tokens == (0, 5, 6, 7, 8)
    assert own.depths == (0, 1, 2, 2, 1)
    assert own.reads == ((0, 1, 2), (0, 1, 3), (0, 4), (0,))
    assert own.sees[:, 0].all()


def test_a_batch_sees_its_real_prompt_its_ancestors_and_nothing_else() -> None:
    tokens, depths, sees = rows([tree(ANSWERS), tree(((4, 9),))], pad_id=0)
    assert tokens.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert depths.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    whole = beside_prompts(torch.tensor([[1, 1], [0, 1]]), sees).int()
    assert whole[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert whole[1, :3].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert not whole[1, :3, 3:].any()
    mask = additive(whole.bool(), torch.bfloat16)
    assert mask.shape == (2, 1, 6, 6)
    assert torch.equal(mask == 0, whole.bool()[:, None])
    assert bool(mask.isfinite().all())  # minus infinity in a whole row would give NaN


def test_groups_hold_every_answer_once_within_the_limit() -> None:
    assert split(ANSWERS, 100) == [(0, 1, 2, 3)]
    assert split(ANSWERS, 6) == [(0, 1), (2, 3)]
    assert split(ANSWERS, 1) == [(0,), (1,), (2,), (3,)]
