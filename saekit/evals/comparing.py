"""Which of several SAEs is better, as far as the same contexts can tell: paired differences with their intervals.

Contexts that are hard are so for all SAEs, so a difference is known better than the two numbers.  Contexts are drawn
again as a whole, the same for all (:func:`saekit.evals.sums.resamples`).  With ``d`` the difference, ``d*`` that of a
resample and ``s`` the standard deviation of those, the interval is ``d ± a q s``, where ``q`` is the 95th percentile of
``|d* − d| / s``.  ``a`` makes up for resamples of few contexts varying too little, as Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", 3.2, has it.

Of several pairs, ``q`` is the percentile of the largest of all pairs' ``|d* − d| / s``: then all intervals of a metric
hold at once with 95 % (Romano and Wolf 2005, "Exact and Approximate Stepdown Methods for Multiple Hypothesis Testing",
of which this is the single step).  Metrics are not corrected for one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.measuring import Evaluation, plain_number

__all__ = ["LEVEL", "Compared", "differences", "widening"]

LEVEL = 0.95
"""Of every interval."""

Array = NDArray[Any]


@attrs.frozen(kw_only=True)
class Compared:
    """Two SAEs in one metric: ``one − other``."""

    metric: str
    one: str
    other: str
    difference: float
    error: float
    """Its standard error."""
    low: float
    high: float
    """The 95 % interval of this pair alone."""
    joint_low: float
    joint_high: float
    """The one that holds together with those of all other pairs of this metric."""

    @property
    def distinguishable(self) -> bool:
        """Whether the joint interval holds no 0."""
        return self.joint_low > 0 or self.joint_high < 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data; numbers that are none are None."""
        found = attrs.asdict(self)
        found = {name: plain_number(value) if isinstance(value, float) else value for name, value in found.items()}
        return found | {"distinguishable": self.distinguishable}


def differences(found: Mapping[str, Evaluation], metrics: Sequence[str] | None = None) -> list[Compared]:
    """Of every two of ``found``, evaluations by the names of SAEs, in every metric that has errors in both.

    ``metrics`` are those that are wanted, by default all.  :class:`ConfigError` where they are of different contexts.
    """
    _check_same(found)
    known = dict.fromkeys(name for evaluation in found.values() for name in evaluation.resampled)
    wanted = [name for name in (known if metrics is None else metrics) if name in known]
    return [pair for metric in wanted for pair in _in_one_metric(found, metric)]


def _check_same(found: Mapping[str, Evaluation]) -> None:
    (first, one), *others = found.items()
    for name, other in others:
        digests = one.about.get("contexts_digest"), other.about.get("contexts_digest")
        if one.contexts != other.contexts or digests[0] != digests[1]:
            raise ConfigError(
                f"paired differences need evaluations on the same contexts: {first} was measured on "
                f"{len(one.contexts):,} contexts and {name} on {len(other.contexts):,}, which are not the same. "
                "Measure both on the same text"
            )


def _in_one_metric(found: Mapping[str, Evaluation], metric: str) -> list[Compared]:
    have = [name for name, evaluation in found.items() if metric in evaluation.resampled]
    pairs = list(itertools.combinations(have, 2))
    if not pairs:
        return []
    with np.errstate(invalid="ignore"):  # of what is no number
        values = np.array([found[one].values[metric] - found[other].values[metric] for one, other in pairs])
        drawn = np.array([found[one].resampled[metric] - found[other].resampled[metric] for one, other in pairs])
    wide = widening(len(next(iter(found.values())).contexts))
    spread, off = _spread(values, drawn)
    alone = np.array([_quantile(row) for row in off])
    comparable = np.isfinite(spread)
    together = _quantile(off[comparable].max(0)) if comparable.any() else math.nan
    return [
        Compared(
            metric=metric,
            one=one,
            other=other,
            difference=float(value),
            error=float(error),
            **_interval(float(value), float(error), wide * float(q), wide * together),
        )
        for (one, other), value, error, q in zip(pairs, values, spread, alone, strict=True)
    ]


def _spread(values: Array, drawn: Array) -> tuple[Array, Array]:
    """``s [pairs]``, and ``|d* − d| / s [pairs, r]``; 0 where nothing varies, nan where there are no numbers."""
    finite = np.isfinite(drawn).all(0)
    drawn = drawn[:, finite]
    if drawn.shape[1] < 2:
        return np.full(len(values), math.nan), np.full((len(values), 1), math.nan)
    spread = drawn.std(axis=1, ddof=1)
    off = np.abs(drawn - values[:, None]) / np.where(spread > 0, spread, 1)[:, None]
    return np.where(np.isfinite(values), spread, math.nan), np.where(spread[:, None] > 0, off, 0)


def _quantile(off: Array) -> float:
    return float(np.quantile(off, LEVEL)) if np.isfinite(off).all() else math.nan


def _interval(value: float, error: float, alone: float, together: float) -> dict[str, float]:
    return {
        "low": value - alone * error,
        "high": value + alone * error,
        "joint_low": value - together * error,
        "joint_high": value + together * error,
    }


def widening(n: int) -> float:
    """``a``: ``√(n / (n − 1)) t / z``, with the quantiles of Student's t of ``n − 1`` degrees and of a normal one.

    A resample of ``n`` contexts varies as if they were all that there are, and less than what is drawn anew.
    """
    if n < 2:
        return math.nan
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    return math.sqrt(n / (n - 1)) * _t_quantile(z, n - 1) / z


def _t_quantile(z: float, degrees: int) -> float:
    """Student's t where a normal one has ``z`` (Abramowitz and Stegun 26.7.5); to 1 % from 3 degrees on."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees ** (power + 1) for power, term in enumerate(terms))
