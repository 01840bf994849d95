"""Where a few numbers are among many, on a CPU: in blocks that stay in the cache.

A comparison with torch writes a mask as large as a quarter of the numbers, and its ``nonzero`` reads it many times as
slowly as NumPy's.  Here each block is compared, and what it holds is found, while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["at_least", "count_where", "not_above", "not_zero", "places_where"]

_BLOCK = 1 << 18  # numbers: a megabyte of them in float32, and a quarter of one of their mask
_FEW = 8  # so many places for each that is looked for: then many words of eight are empty

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Test: TypeAlias = Callable[[Array, slice, Array], object]
"""Given the numbers of some rows, which rows they are, and a mask: writes there which of them are looked for."""


def not_above(bounds: Tensor) -> Test:
    """For what is not at most ``bounds [m]``, one of each column: what is no number is found, too."""
    those = bounds.detach().numpy()

    def test(numbers: Array, rows: slice, out: Array) -> None:
        np.logical_not(np.less_equal(numbers, those, out=out), out=out)

    return test


def at_least(bounds: Tensor) -> Test:
    """For what reaches ``bounds [n, 1]``, one of each row."""
    those = bounds.detach().numpy()
    return lambda numbers, rows, out: np.greater_equal(numbers, those[rows], out=out)


def not_zero(numbers: Array, rows: slice, out: Array) -> None:
    """For what is not zero."""
    np.not_equal(numbers, 0, out=out)


def places_where(numbers: Tensor, test: Test, limit: int | None = None) -> Tensor | None:
    """Where in the flattened ``numbers [n, m]``, in one piece, are those that ``test`` looks for: ``[places]``, rising.

    None when there are more than ``limit``, or when an eighth of the rows, or a block if that is more, have twice their
    part of them: then it is not worth while to look on.
    """
    found, total, least = [], 0, numbers.numel() // 8
    for start, mask, number in _masks(numbers, test):
        total, seen = total + number, start + mask.size
        if limit is not None and (total > limit or (seen >= least and total * numbers.numel() > 2 * limit * seen)):
            return None
        found.append(_true_places(mask, number) + start)
    return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)


def count_where(numbers: Tensor, test: Test) -> int:
    """How many of ``numbers [n, m]``, in one piece, ``test`` looks for."""
    return sum(number for _, _, number in _masks(numbers, test))


def _masks(numbers: Tensor, test: Test) -> Iterator[tuple[int, Array, int]]:
    """Block by block: its first place, where it has what is looked for, and how often.  The next uses its memory."""
    n, m = numbers.shape
    read, height = numbers.detach().numpy(), max(_BLOCK // max(m, 1), 1)
    memory = np.empty((min(height, n), m), dtype=np.bool_)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        mask = memory[: rows.stop - start]
        test(read[rows], rows, mask)
        yield start * m, mask.reshape(-1), int(np.count_nonzero(mask))


def _true_places(mask: Array, number: int) -> Array:
    """Where ``mask`` is true, as it is ``number`` times."""
    if number * _FEW > len(mask) or len(mask) % 8:
        return np.flatnonzero(mask)
    by_word = mask.view(np.int64)
    words = np.flatnonzero(by_word != 0)
    there = np.flatnonzero(by_word.take(words).view(np.bool_))
    places: Array = words.take(there >> 3) << 3
    places += there & 7
    return places
