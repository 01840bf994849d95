"""The order in which the rows of a cache are read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["RowOrder"]

IntArray = npt.NDArray[np.int64]
_ROUNDS, _LEAST_HALF = 6, 4
_BLOCKS_MIXED, _ROWS_MIXED = 4096, 2**20  # at most


class RowOrder:
    """A permutation of ``range(n)`` that depends on ``seed`` alone, and needs no memory however large ``n`` is.

    Numbers go through a Feistel network over the next power of four, again and again until they fall below ``n``
    (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).  With ``block`` above 1, blocks
    of that many neighbors are permuted, and then the rows of each 4,096 blocks (fewer large ones) among themselves,
    which suits storage that is slow at reading single rows.
    """

    def __init__(self, n: int, seed: int, block: int = 1) -> None:
        self._n, self._seed, self._block = n, seed, block
        self._blocks = n // block
        self._mix = min(max(_ROWS_MIXED // block, 16), _BLOCKS_MIXED)  # blocks whose rows are mixed
        self._window = self._mix * block  # the positions of those rows
        self._last = max(self._blocks - 1, 0) // self._mix  # this window has the rows that fill no block, too
        self._mixed: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self._n

    def rows(self, start: int, stop: int) -> IntArray:
        """The rows at positions ``start`` to ``stop`` of the order."""
        if self._block == 1:
            return _permuted(np.arange(start, stop), self._n, self._seed)
        parts = []
        while start < stop:
            number = min(start // self._window, self._last)
            end = stop if number == self._last else min(stop, (number + 1) * self._window)
            parts.append(self._of_window(number)[start - number * self._window : end - number * self._window])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _of_window(self, number: int) -> IntArray:
        if self._mixed[0] != number:
            first = number * self._mix
            blocks = _permuted(np.arange(first, min(first + self._mix, self._blocks)), self._blocks, self._seed)
            rows = (blocks[:, None] * self._block + np.arange(self._block)).ravel()
            if number == self._last:
                rows = np.concatenate([rows, np.arange(self._blocks * self._block, self._n)])
            order = _permuted(np.arange(len(rows)), len(rows), self._seed + 1 + number)
            self._mixed = (number, rows[order])
        return self._mixed[1]


def _permuted(positions: IntArray, n: int, seed: int) -> IntArray:
    """Where a seeded permutation of ``range(n)`` sends ``positions``."""
    half = max((max(n - 1, 1).bit_length() + 1) // 2, _LEAST_HALF)
    keys = np.random.default_rng(seed).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    found = positions.astype(np.uint64)
    outside = np.arange(len(found))
    # A few rows fall outside again and again, so where all that they can be sent to is known at once, it is looked up.
    known = _feistel(np.arange(1 << 2 * half, dtype=np.uint64), half, keys) if half == _LEAST_HALF else None
    while len(outside):
        left = found[outside]
        found[outside] = sent = _feistel(left, half, keys) if known is None else known[left]
        outside = outside[sent >= n]
    return found.astype(np.int64)


def _feistel(numbers: npt.NDArray[np.uint64], half: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # the finaliser of SplitMix64 (Steele et al. 2014)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed >> np.uint64(33)) & mask)
    return (left << bits) | right
