"""Seconds of several calls that are made in turn, with how far they lie apart; for `saekit bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch

from saekit.devices import synchronize

__all__ = ["Spread", "seconds_in_turn"]

_UNSTEADY = 1.15  # times the lower quartile: where half of the calls took longer, they are not steady
_WARM = 1.1  # calls at the beginning that take longer than this times the median of those after them do not count
_KEPT = 3  # calls that count in any case, where there were more
_BURST = 0.02  # seconds for which one thing is called again and again
_MOST = 12  # calls of a burst


@attrs.frozen(kw_only=True)
class Spread:
    """How long the calls of one thing took that count, in seconds."""

    low: float
    """A quarter of the calls took less; of a few calls, the least."""
    median: float
    high: float
    """A quarter took more."""
    calls: int
    """That count."""

    @property
    def unsteady(self) -> bool:
        """Whether calls lie so far apart that `low` may be another the next time; of one call nobody knows."""
        return self.calls < 2 or self.median > _UNSTEADY * self.low

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Without the calls at the beginning that made memory, filled caches and took decisions."""
        start = min(1, len(times) - 1)
        while len(times) - start > _KEPT and times[start] > _WARM * statistics.median(times[start + 1 :]):
            start += 1
        counted = sorted(times[start:])
        low, high = counted[len(counted) // 4], counted[-1 - len(counted) // 4]
        return cls(median=statistics.median(counted), low=low, high=high, calls=len(counted))


class _Way:
    """One of the things that are called, and its times."""

    def __init__(self, work: Callable[[], object], device: torch.device | str) -> None:
        self.work, self.device = work, device
        self.times: list[float] = []
        self.spent = 0.0

    def call(self, *, counts: bool = True) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        self.work()
        synchronize(self.device)
        taken = time.perf_counter() - start
        self.spent += taken
        if counts:
            self.times.append(taken)

    @property
    def expected(self) -> float:
        return min(self.times[-_KEPT:])

    def burst(self, rest: float) -> None:
        """Calls one after the other, as a run makes them; where they are short, others have emptied the caches."""
        number = max(min(int(min(_BURST, rest) / max(self.expected, 1e-9)), _MOST), 1)
        for index in range(number):
            self.call(counts=number < _KEPT or index > 0)


def seconds_in_turn(
    works: Mapping[str, Callable[[], object]], device: torch.device | str, ends: float
) -> dict[str, Spread]:
    """Of each of ``works``; calls go on until the clock (``time.perf_counter``) shows about ``ends``.

    Each is called once in any case.  After that it is the turn of the one that has taken the least time so far, so
    that whatever else the machine does meets all of them, and short ones are called often.  No call begins that would
    end later.
    """
    ways = {name: _Way(work, device) for name, work in works.items()}
    for way in ways.values():
        way.call()
    while True:
        rest = ends - time.perf_counter()
        open_ways = [way for way in ways.values() if way.expected <= rest]
        if not open_ways:
            return {name: Spread.of(way.times) for name, way in ways.items()}
        min(open_ways, key=lambda way: way.spent).burst(rest)
