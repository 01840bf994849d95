"""Curves as a row of letters, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from saekit.reports.history import Piece

__all__ = ["sparkline"]

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(
    pieces: Sequence[Piece], width: int, *, lower: float | None = None, upper: float | None = None, log: bool = False
) -> str:
    """``pieces`` over their tokens in ``width`` letters, of which each has the mean of what falls into it.

    From ``lower`` to ``upper``, or from the least to the largest; a place where there is no number is left free.
    """
    if not pieces or width < 1:
        return ""
    end = max(pieces[-1].x, 1.0)
    sums, counts = [0.0] * width, [0] * width
    for piece in pieces:
        if math.isfinite(piece.mean):
            place = min(max(math.ceil(piece.x / end * width) - 1, 0), width - 1)
            sums[place] += piece.mean
            counts[place] += 1
    means = [total / number if number else math.nan for total, number in zip(sums, counts, strict=True)]
    means = _filled(means)
    log = log and all(mean > 0 for mean in means if math.isfinite(mean))
    heights = [math.log(mean) if log and math.isfinite(mean) else mean for mean in means]
    finite = [height for height in heights if math.isfinite(height)]
    low = min(finite, default=0.0) if lower is None else lower
    high = max(finite, default=0.0) if upper is None else upper
    return "".join(_bar(height, low, high) for height in heights)


def _filled(means: list[float]) -> list[float]:
    """Where records are fewer than letters, what was before stays; nothing is made up before the first."""
    known, last = math.nan, max((n for n, mean in enumerate(means) if math.isfinite(mean)), default=-1)
    found = []
    for n, mean in enumerate(means):
        known = mean if math.isfinite(mean) else known
        found.append(known if n <= last else math.nan)
    return found


def _bar(height: float, low: float, high: float) -> str:
    if not math.isfinite(height):
        return " "
    if high <= low:
        return _BARS[0]
    part = (height - low) / (high - low)
    return _BARS[min(max(int(part * len(_BARS)), 0), len(_BARS) - 1)]
