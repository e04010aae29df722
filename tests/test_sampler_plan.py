"""The plan's parts against hand calculation and a literal oracle."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
from sampler_checks import OPTIONS, PLAN, SIZES

from more_ds.data import streams
from more_ds.data.sampler import SCOPES, BalancedSampler, task_probabilities

every_scope = pytest.mark.parametrize("scope", SCOPES)
every_strategy = pytest.mark.parametrize("strategy", sorted(OPTIONS))


def literal_merge(streams_: dict[int, float], seed: int, count: int) -> list[int]:
    """The stream of each unit in order of time, from the definition, with no random access."""
    total = sum(streams_.values())
    events = []
    for key, rate in streams_.items():
        for n in range(int((count + 2 * len(streams_) + 4) * rate / total) + 1):
            words = np.random.PCG64(np.random.SeedSequence((seed, 0, key, n // 256)))
            word = int(words.random_raw(256)[n % 256])
            events.append(((n + 0.25 + (word >> 11) * 2.0**-54) * total / rate, key))
    return [key for _, key in sorted(events)[:count]]


def literal_sequence(rates: list[float], seed: int, count: int) -> list[tuple[int, int]]:
    """(task, which of its units) of the first units; a task above half is merged with the rest."""
    left = dict(enumerate(rates))
    levels: list[tuple[int, list[int]]] = []
    while len(left) > 2 and max(left.values()) > sum(left.values()) / 2:
        top = max(left, key=lambda task: left[task])
        share = left.pop(top)
        rest = len(rates) + len(levels)
        levels.append((rest, literal_merge({top: share, rest: sum(left.values())}, seed, count)))
    order = literal_merge(left, seed, count)
    for rest, merged in reversed(levels):
        inner = iter(order)
        order = [next(inner) if key == rest else key for key in merged]
    seen = [0] * len(rates)
    units = []
    for task in order:
        units.append((task, seen[task]))
        seen[task] += 1
    return units


@pytest.mark.parametrize("rates", [[4, 3, 2, 1], [11, 600, 5, 300, 4], [4, 2, 2], [1, 9], [7]])
def test_task_sequence_is_its_definition_at_every_place(rates: list[float]) -> None:
    expected = literal_sequence(rates, seed=3, count=1500)
    sequence = streams.TaskSequence(rates, seed=3)
    for start, stop in [(0, 1500), (0, 1), (1, 40), (255, 258), (511, 1100), (1499, 1500)]:
        tasks, ordinals = sequence.units(start, stop)
        assert list(zip(tasks.tolist(), ordinals.tolist(), strict=True)) == expected[start:stop]
    for unit in (0, 1, 7, 256, 999, 1499):
        counts = [sum(task == t for task, _ in expected[:unit]) for t in range(len(rates))]
        assert sequence.before(unit).tolist() == counts
    with pytest.raises(ValueError, match="found -1"):
        sequence.units(-1, 3)


def test_one_large_task_does_not_bunch_small_ones() -> None:
    """Merged in one go, small tasks meet by chance; through one stream they keep their distance."""
    sequence = streams.TaskSequence([0.997, 0.001, 0.001, 0.001], seed=0)
    tasks, _ = sequence.units(0, 400_000)
    places = np.flatnonzero(tasks)
    assert abs(len(places) - 1200) <= 2
    assert np.diff(places).min() >= 0.5 / 0.003 - 3


def test_equal_shares_are_reshuffled_rounds_not_a_cycle() -> None:
    sampler = BalancedSampler([50] * 4, strategy="uniform", group_size=1, groups_per_step=4, seed=0)
    rounds = [tuple(sampler.step(step).tasks.tolist()) for step in range(300)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    assert len(set(rounds)) == 24


def test_tiny_share_is_neither_starved_nor_bunched() -> None:
    sampler = BalancedSampler(
        [1000, 10],
        strategy="weights",
        weights=[1.0, 1e-4],
        group_size=1,
        groups_per_step=1,
        seed=5,
    )
    for steps in (10_000, 35_000, 1_000_000, 10**9):
        samples = sampler.summary(steps)[1].samples
        assert abs(samples - steps * 1e-4 / 1.0001) <= 1.5
    assert sampler.summary(10_000)[1].samples >= 1


def test_zero_weight_leaves_a_task_out() -> None:
    sampler = BalancedSampler([8, 8, 8], strategy="weights", weights=[1, 0, 3], group_size=2, groups_per_step=4, seed=0)
    assert [row.samples for row in sampler.summary(100)] == [200, 0, 600]
    assert 1 not in np.concatenate([sampler.step(s).tasks for s in range(100)])


@every_scope
@every_strategy
def test_counts_and_summary_are_what_the_steps_hold(strategy: str, scope: str) -> None:
    sampler = BalancedSampler(**PLAN, **OPTIONS[strategy], scope=scope)
    length, seen = sampler.steps_per_epoch, np.zeros(len(SIZES), dtype=int)
    for epoch in range(3):
        tasks = np.concatenate([sampler.step(epoch * length + s).tasks for s in range(length)])
        own = np.bincount(tasks, minlength=len(SIZES))
        assert own.tolist() == sampler.counts(epoch).tolist()
        assert own.sum() == length * 256
        seen += own
        assert {sampler.epoch_of(epoch * length + s) for s in range(length)} == {epoch}
    rows = sampler.summary(3 * length)
    assert [row.samples for row in rows] == seen.tolist()
    assert [row.passes for row in rows] == (seen / np.array(SIZES)).tolist()
    assert [row.name for row in rows] == [f"task {t}" for t in range(len(SIZES))]


def test_epoch_length() -> None:
    shape: dict[str, Any] = {"sizes": [10, 7, 4], "group_size": 2, "groups_per_step": 3}
    assert BalancedSampler(**shape, strategy="uniform").steps_per_epoch == 4  # 21 / 6
    # 5 + 4 + 2 groups are 11, so one more makes 4 steps; the largest task takes it.
    proportional = BalancedSampler(**shape, strategy="proportional")
    assert proportional.steps_per_epoch == 4
    assert proportional.counts(0).tolist() == proportional.counts(5).tolist() == [12, 8, 4]
    assert proportional.shares.tolist() == [0.5, 1 / 3, 1 / 6]
    whole_steps = BalancedSampler(**shape, strategy="proportional", scope="step")
    assert whole_steps.counts(0).tolist() == [12, 12, 6]  # 2 + 2 + 1 steps of 6
    assert whole_steps.steps_per_epoch == 5


def test_probabilities_by_hand() -> None:
    low, high = math.exp(0.25), math.exp(0.75)
    assert task_probabilities([100, 300], "exp_share") == pytest.approx(
        [low / (low + high), high / (low + high)], rel=1e-14
    )
    assert task_probabilities([1, 3], "proportional").tolist() == [0.25, 0.75]
    assert task_probabilities([1, 3], "uniform").tolist() == [0.5, 0.5]
    assert task_probabilities([1, 9], "temperature", 2.0) == pytest.approx([0.25, 0.75])
    assert task_probabilities([1, 9], "temperature", 1.0) == pytest.approx([0.1, 0.9])
    assert task_probabilities([5, 5, 5], "weights", weights=[1e308, 1e308, 0]).tolist() == [
        0.5,
        0.5,
        0.0,
    ]


@pytest.mark.parametrize("strategy", ["exp_share", "proportional"])
def test_work_to_reach_a_step_does_not_grow_with_it(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P12: random words drawn for the first batch and for a resume, over a million samples."""
    drawn = []
    words = streams.words

    def counted(count: int, *key: int) -> Any:
        drawn.append(count)
        return words(count, *key)

    monkeypatch.setattr(streams, "words", counted)
    sizes = [700_000, 250_000, 49_000, 1_000]
    for epochs in (0.0, 0.5, 2.5, 1000.5):
        drawn.clear()
        sampler = BalancedSampler(sizes, strategy=strategy, group_size=8, groups_per_step=4)
        sampler.step(int(sampler.steps_per_epoch * epochs))
        # At most two permutations a task, and the task order of one chunk.
        assert sum(drawn) <= 2 * sum(sizes) + 10_000
        assert len(drawn) <= 40


def test_order_is_the_same_on_every_machine() -> None:
    """A saved place means the same samples under any NumPy and platform; a change is a version."""
    digest = hashlib.sha256()
    for strategy, scope in itertools.product(sorted(OPTIONS), SCOPES):
        sampler = BalancedSampler(**PLAN, **OPTIONS[strategy], scope=scope)
        for step in (0, 1, 17, 123_456):
            plan = sampler.step(step)
            digest.update(plan.tasks.astype("<i8").tobytes())
            digest.update(plan.indices.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "7ea08b3f0c718d0d"
