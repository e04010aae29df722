"""Timing variants against each other on a machine that other jobs share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Ratio:
    """Seconds of a variant over those of the reference in the same round: median and quartiles over the rounds.

    Attributes:
        seconds: median time of the variant alone, in seconds.
    """

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def compare(
    variants: Mapping[str, Callable[[], object]], reference: str, *, rounds: int, seed: int = 0
) -> dict[str, Ratio]:
    """Run all variants in every round, in random order, and take the ratios within the rounds.

    A burst of another job then meets all variants alike, or one of them in one round, which the median drops. The first
    round warms up and does not count.

    Args:
        variants: by name; each does its whole work when it is called.
        reference: the name that the others are divided by.
        rounds: that count.
        seed: of the order.
    """
    draw = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        order = list(variants)
        draw.shuffle(order)
        for name in order:
            synchronise()
            began = time.perf_counter()
            variants[name]()
            synchronise()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    base = np.array(seconds[reference])
    found = {}
    for name, own in seconds.items():
        low, median, high = np.percentile(np.array(own) / base, [25, 50, 75])
        found[name] = Ratio(float(median), float(low), float(high), float(np.median(own)))
    return found


def synchronise() -> None:
    """Wait until the GPU, if there is one, has done what it was sent."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
