"""The order of tasks that are too large to hold one: the sampler's properties again, and what the memory holds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import test_sampler
from sampler_checks import CHECKS, OPTIONS, PLAN
from test_sampler import every_scope

from more_ds.data import sampler as module
from more_ds.data.far_passes import FAR, FarPasses, Permutation
from more_ds.data.sampler import BalancedSampler
from more_ds.data.streams import WINDOW


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAR", 0)


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_number_comes_once(size: int) -> None:
    assert sorted(Permutation(size, 3, size)(np.arange(size)).tolist()) == list(range(size))


def test_places_and_neighbours_are_left_to_chance() -> None:
    """Over 3,000 keys, all places of a number, and all orders of three, within five standard deviations of equal."""
    drawn = np.array([Permutation(11, 5, key)(np.arange(11)) for key in range(3000)])
    counts = np.array([np.bincount(drawn[:, place], minlength=11) for place in range(11)])
    assert np.abs(counts - 3000 / 11).max() < 5 * (3000 / 11) ** 0.5
    orders = np.bincount(drawn[:, :3].argsort(1) @ [9, 3, 1])
    assert np.abs(orders[orders > 0] - 500).max() < 5 * 500**0.5
    assert (orders > 0).sum() == 6


@every_scope
@pytest.mark.parametrize("strategy", ["exp_share", "proportional"])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.usefixtures("far")
def test_property(check: Callable[..., None], strategy: str, scope: str) -> None:
    check(BalancedSampler, **PLAN, **OPTIONS[strategy], scope=scope)


@pytest.mark.usefixtures("far")
def test_every_sample_in_every_epoch() -> None:
    test_sampler.test_proportional_shows_every_sample_in_every_epoch()


@pytest.mark.slow
@pytest.mark.usefixtures("far")
def test_properties_of_random_plans() -> None:
    test_sampler.test_properties_of_random_plans()


@pytest.mark.parametrize("epoch", [None, 1000, 1003, 1700])
def test_a_pass_by_pieces_is_the_pass_as_a_whole(epoch: int | None) -> None:
    """With lengths: any cut gives the same, units hold similar lengths, and every pass is a permutation."""
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    whole = FarPasses(1000, 2, 7, epoch, lengths, 4).take(0, 5000)
    pieces, at = [], 0
    for count in np.random.default_rng(1).integers(1, 700, 100):
        pieces.append(FarPasses(1000, 2, 7, epoch, lengths, 4).take(at, int(min(count, 5000 - at))))
        at += len(pieces[-1])
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for number in range(5):
        assert sorted(whole[number * 1000 : number * 1000 + 1000]) == list(range(1000))
    spread = np.ptp(lengths[whole].reshape(-1, 4), axis=1)
    assert np.median(spread) < 8
    chance = np.ptp(lengths[np.random.default_rng(2).permutation(1000)].reshape(-1, 4), axis=1)
    assert np.median(chance) > 80
    assert 4 * WINDOW < 1000


def test_a_task_of_a_billion_samples_takes_no_memory() -> None:
    tracemalloc.start()
    sampler = BalancedSampler([10**9, 10**8, 50], strategy="proportional", group_size=8, groups_per_step=32, seed=1)
    steps = [sampler.step(step) for step in (0, 1, 10**6, sampler.steps_per_epoch + 3)]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 20e6
    assert all(step.indices.min() >= 0 and step.indices.max() < 10**9 for step in steps)
    own = np.concatenate([step.indices[step.tasks == 0] for step in steps])
    assert len(set(own.tolist())) == len(own)
    assert FAR < 10**9
