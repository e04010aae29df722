"""What the sampler refuses: bad settings, cuts that mix tasks, states of other plans."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from sampler_checks import SMALL

from more_ds.data.sampler import BalancedSampler
from more_ds.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": []}, "at least one sample; found sizes []"),
        ({"sizes": [3, 0]}, "found sizes [3, 0]"),
        ({"strategy": "propotional"}, "did you mean 'proportional'"),
        ({"scope": "steps"}, "did you mean 'step'"),
        ({"temperature": 2.0}, "no effect with strategy 'exp_share'"),
        ({"strategy": "temperature", "temperature": 0.0}, "above 0 and finite; found 0.0"),
        ({"strategy": "temperature", "temperature": math.nan}, "finite; found nan"),
        ({"strategy": "temperature", "temperature": math.inf}, "finite; found inf"),
        ({"strategy": "temperature", "temperature": 0.01}, "task 1 would get probability"),
        ({"weights": [1, 1]}, "found 2 weights with strategy 'exp_share'"),
        ({"strategy": "weights"}, "found no weights with strategy 'weights'"),
        ({"strategy": "weights", "weights": [1]}, "found 1 weights for 2 tasks"),
        ({"strategy": "weights", "weights": [1, -1]}, "found [1.0, -1.0]"),
        ({"strategy": "weights", "weights": [1, math.nan]}, "found [1.0, nan]"),
        ({"strategy": "weights", "weights": [0, 0]}, "found [0.0, 0.0]"),
        ({"strategy": "weights", "weights": [1, 1e-13]}, "task 1 would get probability 1.0e-13"),
        ({"group_size": 0}, "group_size must be at least 1; found 0"),
        ({"groups_per_step": 0}, "groups_per_step must be at least 1; found 0"),
        ({"seed": -1}, "found -1"),
        ({"seed": 2**32}, "found 4294967296"),
        ({"names": ["a"]}, "found 1 task names for 2 tasks"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    plan: dict[str, Any] = {"sizes": [30, 10], "group_size": 2, "groups_per_step": 2}
    with pytest.raises(UserError) as caught:
        BalancedSampler(**{**plan, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_micro_batch_that_would_mix_tasks_is_refused() -> None:
    shape: dict[str, Any] = {"sizes": [50, 50], "group_size": 4, "groups_per_step": 6}
    sampler = BalancedSampler(**shape)
    with pytest.raises(UserError, match=r"micro-batch of 8 does not divide .* group of 4 "):
        sampler.micro_batches(0, rank=0, world_size=1, accumulation=3)
    with pytest.raises(UserError, match="24 does not divide by world size 5 x accumulation 1 = 5"):
        sampler.micro_batches(0, rank=0, world_size=5, accumulation=1)
    for rank, accumulation in ((-1, 1), (2, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            sampler.micro_batches(0, rank=rank, world_size=2, accumulation=accumulation)
    whole = BalancedSampler(**shape, scope="step")
    assert len(whole.micro_batches(0, rank=0, world_size=1, accumulation=3)[2][1]) == 8


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 8}, "seed is 7 in the state and 8 in this run"),
        ({"scope": "step"}, "scope is 'micro_batch' in the state and 'step'"),
        ({"strategy": "uniform"}, "strategy is 'exp_share' in the state and 'uniform'"),
        ({"group_size": 4, "groups_per_step": 2}, "group_size is 2 in the state and 4"),
        ({"groups_per_step": 5}, "groups_per_step is 4 in the state and 5"),
        ({"sizes": [61, 10, 30]}, "tasks is '"),
        ({"sizes": [9, 61, 30]}, "tasks is '"),
        ({"names": ["b", "a", "c"]}, "tasks is '"),
    ],
)
def test_foreign_state_is_refused(change: dict[str, Any], field: str) -> None:
    plan = {**SMALL, "names": ["a", "b", "c"]}
    state = BalancedSampler(**plan).state_dict()
    other = BalancedSampler(**{**plan, **change})
    with pytest.raises(UserError) as caught:
        other.load_state_dict(state)
    assert f"another plan: {field}" in str(caught.value)
    assert other.next_step == 0


def test_other_weights_and_temperature_are_foreign() -> None:
    cases: list[tuple[str, list[Any]]] = [
        ("weights", [[1, 2, 3], [1, 2, 3.5]]),
        ("temperature", [2.0, 3.0]),
    ]
    for option, values in cases:
        ours, theirs = (BalancedSampler(**SMALL, strategy=option, **{option: value}) for value in values)
        with pytest.raises(UserError, match=f"another plan: {option} is"):
            ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 cannot be read"),
        ({"version": None}, "version None cannot be read"),
        ({"next_step": -1}, "damaged; found next_step -1"),
        ({"next_step": 1.0}, "damaged; found next_step 1.0"),
        ({"next_step": True}, "damaged; found next_step True"),
        ({"plan": [1]}, "a plan of type list"),
        ({"plan": {}}, "group_size is 'absent' in the state and 2"),
    ],
)
def test_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    sampler = BalancedSampler(**SMALL)
    with pytest.raises(UserError) as caught:
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert message in str(caught.value)


def test_state_of_an_earlier_run_is_read() -> None:
    """The format of version 1, as it lies in checkpoints."""
    plan = {
        "strategy": "exp_share",
        "scope": "micro_batch",
        "group_size": 2,
        "groups_per_step": 4,
        "seed": 7,
        "temperature": 1.0,
        "weights": None,
        "tasks": "7dbda1a1fca346fc",
    }
    sampler = BalancedSampler(**SMALL)
    sampler.load_state_dict({"version": 1, "next_step": 12, "plan": plan})
    assert sampler.next_step == 12


def test_state_is_small_for_many_tasks() -> None:
    sampler = BalancedSampler(
        [10**6] * 64,
        strategy="weights",
        weights=[math.pi] * 64,
        names=["a" * 60] * 64,
        group_size=8,
        groups_per_step=512,
        seed=2**32 - 1,
    )
    sampler.next_step = 10**9
    assert len(json.dumps(sampler.state_dict())) < 1000
