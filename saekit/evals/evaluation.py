"""What evals have found of one SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.values import Histogram

__all__ = ["Difference", "Evaluation", "paired"]


@attrs.frozen(eq=False, kw_only=True)
class Evaluation:
    """Numbers by name with their standard errors."""

    values: Mapping[str, float]
    """The numbers."""
    errors: Mapping[str, float] = attrs.field(factory=dict)
    """The standard errors of those that have one: by bootstrap over contexts."""
    histograms: Mapping[str, Histogram] = attrs.field(factory=dict)
    features: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Numbers of each feature, ``[d_sae]``."""
    remarks: tuple[str, ...] = ()
    """What looks wrong, in words."""
    about: Mapping[str, Any] = attrs.field(factory=dict)
    """What was measured, and how: plain data."""
    contexts: tuple[int, ...] = ()
    """The numbers of the contexts."""
    resampled: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Of each number that has an error ``[n_bootstrap]``: what it is in each resample of the contexts.  Those of SAEs
    that were measured on the same contexts are of the same resamples."""
    sums: Mapping[str, Any] = attrs.field(factory=dict)
    """The :class:`saekit.evals.Sums` of each eval, by its name."""

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def numbers(self) -> dict[str, float]:
        """Values, and errors as ``NAME_se``."""
        return {**self.values, **{f"{name}_se": error for name, error in self.errors.items()}}

    @classmethod
    def joined(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """What several evals have found of one SAE on the same contexts, as one; of a name the first counts."""
        whole = cls(values={})
        for part in parts:
            merged = {
                name: {**getattr(part, name), **getattr(whole, name)}
                for name in ("values", "errors", "histograms", "features", "about", "resampled", "sums")
            }
            remarks = tuple(dict.fromkeys((*whole.remarks, *part.remarks)))
            whole = cls(**merged, remarks=remarks, contexts=whole.contexts or part.contexts)
        return whole


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
