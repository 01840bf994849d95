"""Seconds of steps, and of what they are made on, as a rehearsal finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

__all__ = ["Rehearsed", "Stepped", "part_added"]

_LONGEST = 1.5  # as much of a forward's time, at most, is added to the steps beside it: more is chance


@attrs.frozen(kw_only=True)
class Stepped:
    """Seconds of the steps of one SAE."""

    step: float
    """Between forwards, with what the loop does."""
    late: float
    """The same when those features are dead that fired in no step before, where steps of the run have dead ones: an
    architecture may teach them by products of their own."""
    cold: float
    """What the first step took beyond the others."""
    steps: int
    """How many were timed; 0: there was no time for one."""

    def mean_step(self, steps: int, dead_after: int) -> float:
        """Seconds of the average of ``steps``, of which the first ``dead_after`` have no dead features."""
        early = min(steps, dead_after)
        return (early * self.step + (steps - early) * self.late) / max(steps, 1)


@attrs.frozen(kw_only=True)
class Rehearsed(Stepped):
    """Seconds of what a run does again and again: steps, of which ``cold`` has what the first forward took beyond the
    others, too, and what they are made on."""

    cold_forward: float = 0.0
    """The part of ``cold`` that is the forward's."""
    per_row: float
    """Of a row that the model makes, or that is read, between steps."""
    shared: float
    """How much of the time of a forward that is made while an SAE trains is added to that of its step."""
    forwards: int
    """How many were timed, or reads."""
    held: int = 0
    """Bytes of the rows that were mixed meanwhile."""
    beside: Sequence[Stepped] = ()
    """Of the SAEs that made their steps on the same batches."""

    @classmethod
    def of(cls, own: Stepped, *, cold: float, **found: Any) -> Rehearsed:
        """Of steps of its ``own`` and a first forward that took ``cold`` seconds beyond the others."""
        return cls(step=own.step, late=own.late, cold=own.cold + cold, steps=own.steps, cold_forward=cold, **found)

    @property
    def own(self) -> Stepped:
        """The steps alone."""
        cold = self.cold - self.cold_forward
        return Stepped(step=self.step, late=self.late, cold=cold, steps=self.steps)


def part_added(together: float, step: float, forwards: float) -> float:
    """How much of the time of forwards beside steps is added to these: 0 where they share nothing, 1 where everything.

    ``together``: seconds of a batch with both at once, where by themselves a ``step`` and the ``forwards`` of a batch
    take as many.  Of forwards that take longer than the step, the rest is waited for in any case.
    """
    most = min(step, forwards)
    return min(max((together - step - max(forwards - step, 0.0)) / most, 0.0), _LONGEST) if most > 0 else 1.0
