"""The twelve properties of the sampler as checks of whatever makes one, sound or faulty."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from more_ds.data.sampler import STRATEGIES, BalancedSampler, StepPlan

Make = Callable[..., BalancedSampler]

SIZES = [700, 90, 33, 260, 5, 1, 1500]
PLAN: dict[str, Any] = {"sizes": SIZES, "group_size": 16, "groups_per_step": 16, "seed": 7}
SMALL: dict[str, Any] = {"sizes": [61, 9, 30], "group_size": 2, "groups_per_step": 4, "seed": 7}
WORLDS = (1, 2, 4, 8, 16)
OPTIONS: dict[str, dict[str, Any]] = {
    strategy: {"strategy": strategy} for strategy in STRATEGIES if strategy != "weights"
}
OPTIONS["temperature"]["temperature"] = 2.5
OPTIONS["weights"] = {"strategy": "weights", "weights": [3.0, 0.5, 1.0, 1.0, 0.2, 0.01, 2.0]}


def layouts(sampler: BalancedSampler) -> Iterator[tuple[int, int]]:
    """World sizes and accumulations that cut no same-task unit."""
    unit = sampler.global_batch if sampler.scope == "step" else sampler.group_size
    for world, accumulation in itertools.product(WORLDS, WORLDS):
        size, rest = divmod(sampler.global_batch, world * accumulation)
        if not rest and size and unit % size == 0:
            yield world, accumulation


def by_rank(sampler: BalancedSampler, step: int, world: int, accumulation: int) -> list[list[tuple[int, np.ndarray]]]:
    return [sampler.micro_batches(step, rank=r, world_size=world, accumulation=accumulation) for r in range(world)]


def joined(ranks: list[list[tuple[int, np.ndarray]]]) -> list[tuple[int, int]]:
    """The global batch in order of training: slot by slot, the ranks side by side."""
    slots = zip(*ranks, strict=True)
    return [(task, index) for slot in slots for task, ids in slot for index in ids.tolist()]


def listed(plan: StepPlan) -> list[tuple[int, int]]:
    return list(zip(plan.tasks.tolist(), plan.indices.tolist(), strict=True))


def check_one_task(make: Make, **plan: Any) -> None:
    """P1: the micro-batch (scope "step": the step over all ranks) holds one task."""
    sampler = make(**plan)
    for step in range(4):
        for world, accumulation in layouts(sampler):
            ranks = by_rank(sampler, step, world, accumulation)
            if sampler.scope == "step":
                assert len({task for rank in ranks for task, _ in rank}) == 1
            order = sampler.step(step).tasks.reshape(accumulation, world, -1)
            for r, rank in enumerate(ranks):
                for slot, (task, _) in enumerate(rank):
                    assert set(order[slot, r].tolist()) == {task}


def check_equal_counts(make: Make, **plan: Any) -> None:
    """P2: every rank has `accumulation` micro-batches, all of the same, full size."""
    sampler = make(**plan)
    for step in (0, sampler.steps_per_epoch - 1, sampler.steps_per_epoch):
        for world, accumulation in layouts(sampler):
            full = sampler.global_batch // (world * accumulation)
            for rank in by_rank(sampler, step, world, accumulation):
                assert [len(ids) for _, ids in rank] == [full] * accumulation


def check_passes(make: Make, **plan: Any) -> None:
    """P3: each task's samples come pass by pass, every pass a permutation of all of them."""
    sampler = make(**plan)
    seen: list[list[int]] = [[] for _ in sampler.sizes]
    for step in range(3 * sampler.steps_per_epoch + 1):
        for task, index in listed(sampler.step(step)):
            seen[task].append(index)
    for stream, size in zip(seen, sampler.sizes, strict=True):
        for start in range(0, len(stream), size):
            one_pass = stream[start : start + size]
            assert len(set(one_pass)) == len(one_pass)
            assert set(one_pass) <= set(range(size))


def check_disjoint(make: Make, **plan: Any) -> None:
    """P4: within the first pass no sample is trained on two ranks, in any step."""
    sampler = make(**{**plan, "sizes": [6000, 5000, 4000]})
    for world, accumulation in layouts(sampler):
        seen: list[set[tuple[int, int]]] = [set() for _ in range(world)]
        for step in range(3):
            for own, batches in zip(seen, by_rank(sampler, step, world, accumulation), strict=True):
                own.update((task, int(index)) for task, ids in batches for index in ids)
        assert len(set().union(*seen)) == sum(map(len, seen)) == 3 * sampler.global_batch


def check_seeded(make: Make, **plan: Any) -> None:
    """P5: the seed decides the order, and no epoch or pass repeats the one before."""
    first, again, other = make(**plan), make(**plan), make(**{**plan, "seed": 8})
    length = first.steps_per_epoch
    steps = range(3 * length)
    batches = [listed(first.step(step)) for step in steps]
    assert batches == [listed(again.step(step)) for step in steps]
    assert batches[0] != listed(other.step(0))
    flat = list(itertools.chain.from_iterable(batches))
    for task, size in enumerate(first.sizes):
        stream = [index for which, index in flat if which == task]
        passes = [tuple(stream[i : i + size]) for i in range(0, len(stream) - size + 1, size)]
        if size > 20:
            assert len(set(passes)) == len(passes)
    per_epoch = [[task for batch in batches[e * length : (e + 1) * length] for task, _ in batch] for e in range(3)]
    assert len(first.sizes) == 1 or per_epoch[0] != per_epoch[1] != per_epoch[2]


def check_elastic(make: Make, **plan: Any) -> None:
    """P6: every world size x accumulation trains the same global batch in the same order."""
    sampler = make(**plan)
    for step in range(4):
        expected = listed(sampler.step(step))
        for world, accumulation in layouts(sampler):
            assert joined(by_rank(sampler, step, world, accumulation)) == expected


def check_resume(make: Make, **plan: Any) -> None:
    """P7, P8, P9: from every step of three epochs, on the next world size, the rest is the same."""
    whole = make(**plan)
    last = 3 * whole.steps_per_epoch + 2
    expected = [listed(whole.step(step)) for step in range(last)]
    worlds = itertools.cycle(layouts(whole))
    for stop in range(last):
        before = make(**plan)
        before.next_step = stop
        text = json.dumps(before.state_dict())
        assert len(text) < 1000
        after = make(**plan)
        after.load_state_dict(json.loads(text))
        world, accumulation = next(worlds)
        rest = []
        while after.next_step < min(last, stop + 3):
            rest.append(joined(by_rank(after, after.next_step, world, accumulation)))
            after.next_step += 1
        assert rest == expected[stop : stop + 3]


def check_balance(make: Make, **plan: Any) -> None:
    """P11: every window of 100 steps holds each task's share within 3 sigma + 1 units."""
    sampler = make(**plan)
    unit = sampler.global_batch if sampler.scope == "step" else sampler.group_size
    tasks = np.stack([sampler.step(step).tasks[::unit] for step in range(400)])
    width = 100 * tasks.shape[1]
    for task, share in enumerate(sampler.shares):
        total = np.concatenate([[0], np.cumsum((tasks == task).sum(axis=1))])
        windows = total[100:] - total[:-100]
        bound = 3 * math.sqrt(width * share * (1 - share)) + 1
        assert np.abs(windows - width * share).max() <= bound


CHECKS = (check_one_task, check_equal_counts, check_passes, check_disjoint, check_seeded, check_elastic)
"""Those that hold for every plan."""
