"""The sampler's twelve properties, and that the same checks catch planted faults."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_checks import (
    CHECKS,
    OPTIONS,
    PLAN,
    SMALL,
    Make,
    check_balance,
    check_disjoint,
    check_elastic,
    check_equal_counts,
    check_one_task,
    check_passes,
    check_resume,
    check_seeded,
    listed,
)

from more_ds.data import streams
from more_ds.data.sampler import SCOPES, BalancedSampler, StepPlan

every_scope = pytest.mark.parametrize("scope", SCOPES)
every_strategy = pytest.mark.parametrize("strategy", sorted(OPTIONS))


@every_scope
@every_strategy
@pytest.mark.parametrize("check", CHECKS)
def test_property(check: Callable[..., None], strategy: str, scope: str) -> None:
    options = dict(OPTIONS[strategy])
    if check is check_disjoint and strategy == "weights":
        options["weights"] = [3.0, 0.5, 1.0]
    check(BalancedSampler, **PLAN, **options, scope=scope)


@every_scope
@pytest.mark.parametrize("strategy", ["exp_share", "proportional"])
def test_resume_at_every_step(strategy: str, scope: str) -> None:
    check_resume(BalancedSampler, **SMALL, strategy=strategy, scope=scope)


@every_scope
@every_strategy
@pytest.mark.parametrize("seed", [0, 1])
def test_balance(strategy: str, scope: str, seed: int) -> None:
    plan = {**PLAN, "group_size": 2, "groups_per_step": 2, "seed": seed}
    check_balance(BalancedSampler, **plan, **OPTIONS[strategy], scope=scope)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    group_size=st.sampled_from([1, 2, 3, 8]),
    groups_per_step=st.sampled_from([1, 2, 4, 5]),
    scope=st.sampled_from(SCOPES),
    strategy=st.sampled_from(["exp_share", "proportional", "uniform"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_properties_of_random_plans(**plan: Any) -> None:
    for check in (check_one_task, check_equal_counts, check_passes, check_elastic):
        check(BalancedSampler, **plan)
    check_balance(BalancedSampler, **plan)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    group_size=st.integers(1, 6),
    groups_per_step=st.integers(1, 6),
    scope=st.sampled_from(SCOPES),
    seed=st.integers(0, 1000),
)
def test_proportional_shows_every_sample_in_every_epoch(**plan: Any) -> None:
    sampler = BalancedSampler(strategy="proportional", **plan)
    length = sampler.steps_per_epoch
    for epoch in range(7):
        batches = [listed(sampler.step(epoch * length + step)) for step in range(length)]
        pairs = list(itertools.chain.from_iterable(batches))
        for task, size in enumerate(sampler.sizes):
            own = [index for which, index in pairs if which == task]
            assert set(own) == set(range(size))
            assert 0 <= len(own) - size < sampler.global_batch
            assert len(own) == sampler.counts(epoch)[task]


class OrderPerRank(BalancedSampler):
    """Each rank draws its own task order."""

    def micro_batches(self, step: int, *, rank: int, **layout: int) -> list[Any]:
        own = BalancedSampler(
            self.sizes,
            scope=self.scope,
            group_size=self.group_size,
            groups_per_step=self.groups_per_step,
            seed=rank,
        )
        return own.micro_batches(step, rank=rank, **layout)


class WorldInSeed(BalancedSampler):
    """The order depends on the number of ranks."""

    def micro_batches(self, step: int, *, world_size: int, **layout: int) -> list[Any]:
        own = BalancedSampler(
            self.sizes,
            scope=self.scope,
            group_size=self.group_size,
            groups_per_step=self.groups_per_step,
            seed=7 + world_size,
        )
        return own.micro_batches(step, world_size=world_size, **layout)


class ChangedOrders(BalancedSampler):
    """Base of the faults in the order of samples: `order(passes, k)` replaces pass k."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for passes in self._passes:
            changed = functools.partial(self.order, passes)
            passes._permutation = changed  # type: ignore[method-assign]

    def order(self, passes: streams.Passes, number: int) -> np.ndarray:
        raise NotImplementedError


class DropLast(ChangedOrders):
    """A pass leaves out the remainder that fills no group, and repeats others instead."""

    def order(self, passes: streams.Passes, number: int) -> np.ndarray:
        order = streams.Passes._permutation(passes, number)
        return np.resize(order[: max(1, len(order) // 16 * 16)], len(order))


class NoReshuffle(ChangedOrders):
    """Every pass is the first pass again."""

    def order(self, passes: streams.Passes, number: int) -> np.ndarray:
        return streams.Passes._permutation(passes, 0)


class RestartOnResume(BalancedSampler):
    """Resuming begins again at the start of the data."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.next_step = 0


class RestartOfEpoch(BalancedSampler):
    """Resuming begins again at the start of the epoch."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.next_step -= self.next_step % self.steps_per_epoch


class TasksInBlocks(BalancedSampler):
    """The right counts in each epoch, but one task after the other."""

    def step(self, step: int) -> StepPlan:
        epoch, place = divmod(step, self.steps_per_epoch)
        ends = np.cumsum(self.counts(epoch))
        rows = np.arange(place * self.global_batch, (place + 1) * self.global_batch)
        tasks = np.searchsorted(ends, rows, side="right")
        return StepPlan(tasks, np.zeros_like(tasks))


class UnevenRanks(BalancedSampler):
    """The last rank gets a short batch at the end of an epoch."""

    def micro_batches(self, step: int, *, rank: int, world_size: int, **layout: int) -> list[Any]:
        parts = super().micro_batches(step, rank=rank, world_size=world_size, **layout)
        if rank == world_size - 1 and (step + 1) % self.steps_per_epoch == 0:
            parts[-1] = (parts[-1][0], parts[-1][1][:-1])
        return parts


class OneBatchTooMany(BalancedSampler):
    """The first rank takes one more micro-batch than the others."""

    def micro_batches(self, step: int, *, rank: int, **layout: int) -> list[Any]:
        parts = super().micro_batches(step, rank=rank, **layout)
        return [*parts, parts[0]] if rank == 0 else parts


class SameSlice(BalancedSampler):
    """Two ranks train on the same slice."""

    def micro_batches(self, step: int, *, rank: int, **layout: int) -> list[Any]:
        return super().micro_batches(step, rank=0, **layout)


BALANCE = {**PLAN, "sizes": [3000, 2500, 800], "group_size": 2, "groups_per_step": 2}


@pytest.mark.parametrize(
    ("fault", "check", "plan"),
    [
        (OrderPerRank, check_one_task, {**PLAN, "scope": "step"}),
        (OrderPerRank, check_elastic, PLAN),
        (WorldInSeed, check_elastic, PLAN),
        (DropLast, check_passes, PLAN),
        (NoReshuffle, check_seeded, PLAN),
        (RestartOnResume, check_resume, SMALL),
        (RestartOfEpoch, check_resume, SMALL),
        (TasksInBlocks, check_balance, BALANCE),
        (UnevenRanks, check_equal_counts, PLAN),
        (OneBatchTooMany, check_equal_counts, PLAN),
        (SameSlice, check_disjoint, PLAN),
    ],
)
def test_planted_fault_is_caught(fault: Make, check: Callable[..., None], plan: Any) -> None:
    check(BalancedSampler, **plan)
    with pytest.raises(AssertionError):
        check(fault, **plan)
