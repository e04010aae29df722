"""Endless random-access streams under the sampler: the order of tasks, the order of samples.

Only raw PCG64 words are drawn, since NumPy keeps those stable between versions but not what
`Generator` makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
AnyIntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]

JITTER_BLOCK = 256
WINDOW = 64  # units whose samples are sorted together
JITTER, PASS, SPLIT, WINDOWS = range(4)  # purposes of the random streams


def words(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """Draw `count` uint64 words from the stream named by `key`."""
    return np.asarray(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count))


def shuffled(items: IntArray, *key: int) -> IntArray:
    return items[np.argsort(words(len(items), *key), kind="stable")]


class TaskSequence:
    """An endless low-discrepancy sequence of tasks with random access.

    Time is cut, for each task, into strata of `spacing` = 1 / share units, and the task gets one
    unit at a random time in the middle half of each; the sequence is all units in order of time.
    So a task never comes in blocks and never starves, however small its share: a window of W time
    units holds W / spacing of it, give or take 1.5. Per task, the number of units before a time x
    is x / spacing within 0.75, so unit n lies within 0.75 * num_tasks + 1 of time n: the events
    around any n are found without walking the sequence.

    A task of more than half the total would inherit the chance meetings of all the others. It is
    therefore merged with *one* stream for the rest, whose units a sequence of its own hands out.
    """

    def __init__(self, rates: Sequence[float], seed: int, depth: int = 0) -> None:
        """Share the units out in proportion to `rates`, shape [num_tasks]; a rate may be 0."""
        self._seed = seed
        self._rest: TaskSequence | None = None
        self._ids = np.arange(len(rates))
        top = max(range(len(rates)), key=lambda task: rates[task])
        others = [0.0 if task == top else rate for task, rate in enumerate(rates)]
        if rates[top] > math.fsum(others) and np.count_nonzero(others) > 1:
            self._rest = TaskSequence(others, seed, depth + 1)
            self._ids = np.array([top, len(rates) + depth])
            rates = [rates[top], math.fsum(others)]
        total = math.fsum(rates)
        self._spacing = np.array([total / rate if rate else math.inf for rate in rates])

    def before(self, unit: int) -> IntArray:
        """Units of each task among the first `unit`, shape [num_tasks]."""
        first, streams, _, skip = self._events(unit, unit)
        counts = first + np.bincount(streams[:skip], minlength=len(first))
        if self._rest is None:
            return counts
        shared = self._rest.before(int(counts[1]))
        shared[self._ids[0]] = counts[0]
        return shared

    def units(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tasks of the units [start, stop), and which unit of its task each is."""
        _, streams, ordinals, skip = self._events(start, stop)
        streams, ordinals = streams[skip:][: stop - start], ordinals[skip:][: stop - start]
        tasks = self._ids[streams]
        if self._rest is not None and streams.any():
            shared = streams == 1
            first = int(ordinals[shared][0])
            tasks[shared], ordinals[shared] = self._rest.units(first, first + int(shared.sum()))
        return tasks, ordinals

    def _events(self, start: int, stop: int) -> tuple[IntArray, IntArray, IntArray, int]:
        if start < 0:
            raise ValueError(f"units count from 0; found {start}")
        slack = len(self._spacing) + 2
        first = np.floor(max(0, start - slack) / self._spacing).astype(np.int64)
        last = np.ceil((stop + slack) / self._spacing).astype(np.int64)
        streams = np.repeat(np.arange(len(first)), last - first)
        ranges = [np.arange(lo, hi) for lo, hi in zip(first, last, strict=True)]
        jitters = [self._jitter(key, lo, hi) for key, lo, hi in zip(self._ids.tolist(), first, last, strict=True)]
        ordinals = np.concatenate(ranges)
        # A share of 0 has an infinite spacing and no events, so no 0 * inf arises here.
        times = (ordinals + np.concatenate(jitters)) * self._spacing[streams]
        order = np.argsort(times, kind="stable")
        return first, streams[order], ordinals[order], start - int(first.sum())

    def _jitter(self, key: int, start: int, stop: int) -> FloatArray:
        """Place in its stratum, in [0.25, 0.75), of the units [start, stop) of one stream."""
        blocks = range(start // JITTER_BLOCK, -(-stop // JITTER_BLOCK))
        parts = [words(JITTER_BLOCK, self._seed, JITTER, key, block) for block in blocks]
        drawn = np.concatenate([np.empty(0, np.uint64), *parts])
        skip = start - blocks.start * JITTER_BLOCK
        top53 = drawn[skip : skip + stop - start] >> np.uint64(11)
        return 0.25 + 2.0**-54 * top53.astype(np.float64)


class Passes:
    """The endless sample stream of one task: permutation after permutation of its indices.

    With `epoch_samples` (>= size, the task's constant count per epoch) each epoch also holds every
    sample, although passes run across epochs. A pass cut by an epoch's end after h samples opens
    with the first h of a base permutation; the next pass opens with at least those, so the end of
    the one and the opening of the other together hold everything. Base permutations last until
    the surplus over the epochs has made a whole extra pass, where the constraint falls away.
    """

    def __init__(
        self,
        size: int,
        task: int,
        seed: int,
        epoch_samples: int | None,
        lengths: AnyIntArray | None = None,
        unit: int = 1,
    ) -> None:
        """Make the stream of a task.

        Args:
            size: samples of the task.
            task: its number.
            seed: of the permutations.
            epoch_samples: see above; None: epochs promise nothing.
            lengths: [size] of the samples; `unit` consecutive positions, counted from the stream's start, then hold
                samples of similar length. None: chance decides.
            unit: positions that are trained together.
        """
        self._size, self._task, self._seed = size, task, seed
        self._epoch_samples, self._lengths, self._unit = epoch_samples, lengths, unit
        self._held: tuple[int, IntArray] | None = None

    def take(self, start: int, count: int) -> IntArray:
        """Indices at positions [start, start + count) of the stream."""
        parts = []
        while count:
            number, offset = divmod(start, self._size)
            parts.append(self._order(number)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _order(self, number: int) -> IntArray:
        if self._held is None or self._held[0] != number:
            self._held = (number, self._permutation(number))
        return self._held[1]

    def _permutation(self, number: int) -> IntArray:
        key = (self._seed, PASS, self._task, number)
        every = np.arange(self._size)
        head, number_of_base = self._opening(number)
        if head == self._size:
            return self._alike(shuffled(every, *key), number, 0)
        base = shuffled(every, self._seed, SPLIT, self._task, number_of_base)
        mixed = shuffled(base, *key)
        opens = np.isin(mixed, base[:head])
        return np.concatenate([self._alike(mixed[opens], number, 0), self._alike(mixed[~opens], number, head)])

    def _opening(self, number: int) -> tuple[int, int]:
        """How many samples of a pass must come first, and of which base permutation; all, where none must."""
        if self._epoch_samples is None:
            return self._size, 0
        epoch = number * self._size // self._epoch_samples + 1
        return min(epoch * self._epoch_samples - number * self._size, self._size), number - epoch

    def _alike(self, order: IntArray, number: int, offset: int) -> IntArray:
        """Part of a pass, `offset` positions from its start, with samples of similar length in each unit.

        Windows of many units are sorted, cut into units, and the units shuffled: what is trained when stays a matter of
        chance up to the window.
        """
        if self._lengths is None or self._unit == 1:
            return order
        start = number * self._size + offset
        place = min(-start % self._unit, len(order))  # a unit that has begun before
        windows = range(place, len(order), WINDOW * self._unit)
        parts = [self._together(order[at : at + WINDOW * self._unit], start + at) for at in windows]
        return np.concatenate([order[:place], *parts])

    def _together(self, window: IntArray, position: int) -> IntArray:
        """A window that begins at a position of the stream, its samples in units of similar length."""
        assert self._lengths is not None
        own = window[np.argsort(self._lengths[window], kind="stable")]
        whole = len(own) // self._unit
        units = own[: whole * self._unit].reshape(whole, self._unit)
        order = shuffled(np.arange(whole), self._seed, WINDOWS, self._task, position)
        return np.concatenate([units[order].ravel(), own[whole * self._unit :]])
