"""What two SAEs differ in."""

from __future__ import annotations

from typing import NamedTuple

from saekit.evals.comparing import differences
from saekit.measuring import Evaluation

__all__ = ["Difference", "paired"]


class Difference(NamedTuple):
    """By how much a number of one SAE is above that of another, on the same contexts."""

    value: float
    error: float
    """Its standard error, by bootstrap over the contexts that both have in common."""
    low: float
    """Where its 95 % interval begins; see :mod:`saekit.evals.comparing`."""
    high: float


def paired(one: Evaluation, other: Evaluation) -> dict[str, Difference]:
    """``one − other`` for every number that has an error in both.

    Contexts that are hard are so for both, so that this has smaller errors than the two numbers.
    :class:`ConfigError` where they were measured on different contexts.
    """
    pairs = differences({"one": one, "the other": other})
    return {pair.metric: Difference(pair.difference, pair.error, pair.low, pair.high) for pair in pairs}
