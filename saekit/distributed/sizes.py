"""What decides how large messages are.  Imports no torch, so that plans can ask."""

from __future__ import annotations

import math
from itertools import pairwise

__all__ = ["FEW", "LARGE", "OF_ALL", "OF_ROWS", "counts_sent", "digit_ends", "most_entries"]

LARGE = 1 << 16
"""Numbers of a gradient from which on it is a message of its own; smaller ones go together, in float64."""
FEW = 512
"""Candidates of a row that one process hears of from the others; where it would be more, counts are told instead."""
OF_ALL = 11
"""Bits of a digit where one threshold is looked for: few messages."""
OF_ROWS = 2
"""Where each of many rows has one: few bytes."""


def most_entries(rows: int, processes: int, d_sae: int, width: int, itemsize: int = 4) -> int:
    """Active entries of each of some ``processes`` up to which it sends at most half as much if it gives the others its
    rows, with their entries, as if it gave them their parts of the weights' gradients; below 0: always more.

    Each has ``rows``, and ``d_sae`` features; ``width`` is ``d_in + d_out``.  An entry is a row and a feature, of 4
    bytes each, and two numbers.
    """
    left = d_sae * width * itemsize / (2 * processes) - rows * width * itemsize
    return math.floor(left / (2 * 4 + 2 * itemsize))


def digit_ends(bits: int, digit: int) -> list[int]:
    """The bits below each digit of a number of so many ``bits``, the first digit first."""
    return [*range(bits - digit, 0, -digit), 0]


def counts_sent(bits: int, digit: int) -> int:
    """Numbers that each process tells to find one threshold by digits."""
    return sum((1 << (above - below)) - 1 for above, below in pairwise([bits, *digit_ends(bits, digit)]))
