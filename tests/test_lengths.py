"""Batches of similar length: the sampler's promises hold, the tokens are the encoder's, and less is padded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampler_checks import (
    CHECKS,
    OPTIONS,
    PLAN,
    SMALL,
    check_balance,
    check_resume,
)
from tiny_models import tokenizer

from more_ds.data.collate import Collator
from more_ds.data.encoding import Encoder
from more_ds.data.mixture import MicroBatch, Mixture
from more_ds.data.sampler import SCOPES, BalancedSampler
from more_ds.data.tokens import Tokens, tokenised
from more_ds.errors import UserError
from more_ds.tasks.render import Example


def with_lengths(**plan: Any) -> BalancedSampler:
    draw = np.random.RandomState(5)
    return BalancedSampler(**plan, lengths=[draw.randint(3, 90, size) for size in plan["sizes"]])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("strategy", ["exp_share", "proportional"])
@pytest.mark.parametrize("check", [*CHECKS, check_balance])
def test_the_samplers_promises_hold(check: Callable[..., None], strategy: str, scope: str) -> None:
    plan = {**PLAN, **OPTIONS[strategy]}
    check(with_lengths, **plan, scope=scope)


def test_resume_at_every_step() -> None:
    check_resume(with_lengths, **SMALL, strategy="proportional")


def test_another_order_of_lengths_is_another_plan() -> None:
    plan = {"group_size": 2, "groups_per_step": 2}
    state = BalancedSampler([4], **plan, lengths=[np.array([1, 2, 3, 4])]).state_dict()
    with pytest.raises(UserError, match="lengths"):
        BalancedSampler([4], **plan, lengths=[np.array([1, 2, 4, 3])]).load_state_dict(state)
    with pytest.raises(UserError, match="lengths"):
        BalancedSampler([4], **plan).load_state_dict(state)
    with pytest.raises(UserError, match="lengths"):
        BalancedSampler([4], **plan, lengths=[np.array([1, 2, 3])])


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_trained_together_is_of_similar_length(scope: str) -> None:
    lengths = np.random.RandomState(1).randint(5, 105, 4000)
    plan: dict[str, Any] = {"group_size": 8, "groups_per_step": 4, "scope": scope}
    spread = []
    for known in (None, [lengths]):
        sampler = BalancedSampler([4000], **plan, lengths=known)
        units = np.concatenate([sampler.step(s).indices for s in range(300)]).reshape(-1, 8)
        spread.append(float((lengths[units].max(1) - lengths[units].mean(1)).mean()))
        first, last = lengths[units[:200]].mean(), lengths[units[-200:]].mean()
        assert abs(first - last) < 5, "the stream as a whole is no curriculum"
    assert spread[0] > 35
    assert spread[1] < 3


def encoder(limit: int = 12) -> Encoder:
    return Encoder(tokenizer(False), is_encoder_decoder=False, max_source_length=limit, max_target_length=8)


def examples(count: int = 40) -> list[Example]:
    words = ["a" * (1 + i * 7 % 17) for i in range(count)]
    return [Example("t", i, word, "yes" if i % 2 else "no", (), ()) for i, word in enumerate(words)]


def test_tokens_are_the_encoders_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, rows = encoder(), examples()
    tokens = tokenised("t", rows, own, tmp_path)
    literal = encoder()
    for i, row in enumerate(rows):
        assert tokens.prompt(i) == literal.prompt(row.prompt)
        assert tokens.target(i) == literal.target(row.target)
        assert tokens.lengths[i] == len(tokens.prompt(i)) + len(tokens.target(i))
    assert (own.num_prompts, own.num_cut) == (literal.num_prompts, literal.num_cut)
    assert own.num_cut > 0
    again = encoder()
    monkeypatch.setattr(Encoder, "prompts", None)
    assert tokenised("t", rows, again, tmp_path).ids.tolist() == tokens.ids.tolist()
    assert again.num_cut == own.num_cut


def test_other_texts_or_limits_have_tokens_of_their_own(tmp_path: Path) -> None:
    rows = examples()
    for count, (own, given) in enumerate([(encoder(), rows), (encoder(11), rows), (encoder(), rows[1:])], start=1):
        tokenised("t", given, own, tmp_path)
        assert len([p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]) == count


@pytest.mark.parametrize("damage", ["short", "empty", "other"])
def test_damaged_tokens_are_refused(tmp_path: Path, damage: str) -> None:
    tokenised("t", examples(), encoder(), tmp_path)
    folder = next(p for p in (tmp_path / "tokens").iterdir() if p.is_dir())
    if damage == "other":
        (folder / "ends.int64").write_bytes(np.arange(10).tobytes())
    else:
        ids = folder / "ids.int32"
        ids.write_bytes(b"" if damage == "empty" else ids.read_bytes()[:-9])
    with pytest.raises(UserError, match="delete that folder"):
        tokenised("t", examples(), encoder(), tmp_path)


def test_a_target_that_is_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [*examples(), Example("t", 40, "a", "far too long for it", (), ())]
    with pytest.raises(UserError, match="max_target_length"):
        tokenised("t", rows, encoder(), tmp_path)
    assert not [p for p in (tmp_path / "tokens").iterdir() if p.is_dir() and not p.name.endswith(".building")]


def same(a: list[MicroBatch], b: list[MicroBatch]) -> bool:
    return all(
        torch.equal(x.tensors[key], y.tensors[key]) and (x.slot, x.tokens) == (y.slot, y.tokens)
        for x, y in zip(a, b, strict=True)
        for key in x.tensors
    )


def test_collating_ahead_changes_nothing(tmp_path: Path) -> None:
    """In order, after a jump, and for another rank: the batches are those that are made when they are asked for."""
    own, rows = encoder(), examples()
    tokens: Tokens = tokenised("t", rows, own, tmp_path)

    def mixture(ready: bool) -> Mixture:
        sampler = BalancedSampler([40], group_size=4, groups_per_step=4, lengths=[tokens.lengths])
        return Mixture([rows], sampler, encoder(), Collator(0), [tokens] if ready else None)

    ahead, literal = mixture(True), mixture(False)
    for step, rank in [(0, 0), (1, 0), (2, 0), (9, 0), (10, 1), (3, 1), (4, 0)]:
        wanted = literal.micro_batches(step, rank=rank, world=2, accumulation=2)
        assert same(ahead.micro_batches(step, rank=rank, world=2, accumulation=2), wanted)


@pytest.mark.parametrize(("start", "length"), [(None, 16), (0, 16)])
def test_rows_are_padded_to_a_multiple(start: int | None, length: int) -> None:
    batch = Collator(0, start, multiple=8).answers([[5] * 9, [5]], [[6, 1], [6, 1]], [0, 0])
    plain = Collator(0, start).answers([[5] * 9, [5]], [[6, 1], [6, 1]], [0, 0])
    assert batch["input_ids"].shape[1] == length
    assert int(batch["prompt_mask"].sum()) == int(plain["prompt_mask"].sum()) == 10
    assert torch.equal(batch["labels"], plain["labels"])
