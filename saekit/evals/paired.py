"""What two SAEs differ in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saekit.errors import ConfigError
from saekit.measuring import Evaluation

__all__ = ["Difference", "paired"]


class Difference(NamedTuple):
    """By how much a number of one SAE is above that of another, on the same contexts."""

    value: float
    error: float
    """Its standard error, by bootstrap over the contexts that both have in common."""
    low: float
    """Where its 95 % interval begins: the 2.5th percentile of the resamples."""
    high: float


def paired(one: Evaluation, other: Evaluation) -> dict[str, Difference]:
    """``one − other`` for every number that has an error in both.

    Contexts that are hard are so for both, so that this has smaller errors than the two numbers.
    :class:`ConfigError` where they were measured on different contexts.
    """
    digests = one.about.get("contexts_digest"), other.about.get("contexts_digest")
    if one.contexts != other.contexts or digests[0] != digests[1]:
        raise ConfigError("paired differences need evaluations on the same contexts, and these are of different ones")
    found = {}
    for name in [name for name in one.resampled if name in other.resampled]:
        drawn = one.resampled[name] - other.resampled[name]
        finite = drawn[np.isfinite(drawn)]
        enough = len(finite) > 1
        low, high = np.percentile(finite, [2.5, 97.5]) if enough else (np.nan, np.nan)
        error = float(finite.std(ddof=1)) if enough else float("nan")
        found[name] = Difference(one.values[name] - other.values[name], error, float(low), float(high))
    return found
