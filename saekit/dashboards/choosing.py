"""Which features of a store a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.features.feature import Feature
from saekit.features.store import SAEFeatures

__all__ = ["Order", "chosen_features", "max_logits", "ordered"]

Order = Literal["firing", "activation", "logit"]


def chosen_features(sae: SAEFeatures, numbers: Sequence[int]) -> list[Feature]:
    """Those of these numbers, each once, in the order given; :class:`ConfigError` for one that is not there."""
    return [sae.feature(number) for number in dict.fromkeys(numbers)]


def drawn(sae: SAEFeatures, n: int, seed: int) -> list[Feature]:
    """``n`` of those that fire, drawn at random, by number; all of them where there are no more."""
    alive = np.flatnonzero(sae.fired > 0)
    picked = np.sort(np.random.default_rng(seed).choice(alive, min(n, len(alive)), replace=False))
    return [sae.feature(int(sae.indices[row])) for row in picked]


def ordered(sae: SAEFeatures, by: Order, n: int) -> list[Feature]:
    """``n`` of those that fire: that fire most often, most strongly, or raise a logit most."""
    values = _values(sae, by)
    rows = np.argsort(-values, kind="stable")
    rows = rows[sae.fired[rows] > 0][:n]
    return [sae.feature(int(sae.indices[row])) for row in rows]


def max_logits(sae: SAEFeatures) -> NDArray[np.float64]:
    """``[n]``: by how much each feature of the store raises the logit that it raises most."""
    if sae.why_no_logits is not None:
        raise ConfigError([("top_by", f"cannot be 'logit' for {sae.name}: {sae.why_no_logits}")])
    return sae.table("logits", "high").astype(np.float64)


def _values(sae: SAEFeatures, by: Order) -> NDArray[np.float64]:
    if by not in get_args(Order):
        raise ConfigError([("top_by", f"must be firing, activation or logit, found {by!r}")])
    if by == "logit":
        return max_logits(sae)
    return sae.firing_fraction if by == "firing" else sae.maximum
