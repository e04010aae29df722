"""The passes over a task so large that its order is not held: a sample is computed from its position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from more_ds.data.streams import PASS, SPLIT, WINDOW, IntArray, Passes, words

FAR = 2**24
"""Samples of a task above which its order, 128 MB and three times that while it is made, is never made."""

_ROUNDS = 8
_WALK = np.uint64(30), np.uint64(0xBF58476D1CE4E5B9), np.uint64(27), np.uint64(0x94D049BB133111EB), np.uint64(31)


class Permutation:
    """A permutation of range(size) with random access, in no memory.

    A Feistel network permutes the numbers of an even number of bits, the fewest that hold `size`; what it sends outside
    is sent on until it is inside, at most four times on average (cycle walking: "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002). Its round function is the finaliser of SplitMix64.
    """

    def __init__(self, size: int, *key: int) -> None:
        """Name the permutation by `key`."""
        half = max(1, -(-(size - 1).bit_length() // 2))
        self.size, self._half, self._mask = size, np.uint64(half), np.uint64(2**half - 1)
        self._keys = words(_ROUNDS, *key)

    def __call__(self, positions: IntArray) -> IntArray:
        """What stands at positions in range(size)."""
        values = self._rounds(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._rounds(values[outside])
        return values.astype(np.int64)

    def _rounds(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return left << self._half | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    first, one, second, other, third = _WALK
    values = (values ^ values >> first) * one
    values = (values ^ values >> second) * other
    return values ^ values >> third


class FarPasses(Passes):
    """As `Passes`, with the same promises and another order; it holds a window at most."""

    def take(self, start: int, count: int) -> IntArray:
        """Indices at positions [start, start + count) of the stream."""
        parts = [np.empty(0, np.int64)]
        while count:
            number, offset = divmod(start, self._size)
            head = self._opening(number)[0]
            edge = head if offset < head else self._size  # what opens a pass and the rest are sorted apart
            taken = min(count, edge - offset)
            parts.append(self._part(number, 0 if edge == head else head, edge, offset, offset + taken))
            start, count = start + taken, count - taken
        return np.concatenate(parts)

    def _part(self, number: int, low: int, high: int, start: int, stop: int) -> IntArray:
        """Positions [start, stop) of a pass, in its part [low, high)."""
        if self._lengths is None or self._unit == 1:
            return self._drawn(number, start, stop)
        size = WINDOW * self._unit
        place = min(low + -(number * self._size + low) % self._unit, high)
        parts = [self._drawn(number, start, min(stop, place))] if start < place else []
        for window in range(place + (max(start, place) - place) // size * size, stop, size):
            order = self._window(number, window, min(window + size, high))
            parts.append(order[max(start - window, 0) : stop - window])
        return np.concatenate(parts)

    def _window(self, number: int, start: int, stop: int) -> IntArray:
        key = number * self._size + start
        if self._held is None or self._held[0] != key:
            self._held = (key, self._together(self._drawn(number, start, stop), key))
        return self._held[1]

    def _drawn(self, number: int, start: int, stop: int) -> IntArray:
        """What chance puts at positions [start, stop) of a pass, all of them in what opens it, or all after."""
        positions = np.arange(start, stop)
        key = (self._seed, PASS, self._task, number)
        head, base = self._opening(number)
        if head == self._size:
            return Permutation(self._size, *key)(positions)
        whole = Permutation(self._size, self._seed, SPLIT, self._task, base)
        if start < head:
            return whole(Permutation(head, *key, 0)(positions))
        return whole(head + Permutation(self._size - head, *key, 1)(positions - head))
