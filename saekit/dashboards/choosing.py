"""Which features of a store a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.reasons import alike

if TYPE_CHECKING:
    from saekit.features.feature import Feature
    from saekit.features.store import SAEFeatures

__all__ = ["Choice", "Order", "check_choice", "chosen"]

Order = Literal["firing", "activation", "logit"]
_MOST = 2000  # features of a page; of each it has some 25 kB
_DEFAULT = 50


@attrs.frozen(kw_only=True)
class Choice:
    """What decides which features are shown."""

    features: Sequence[int] | Mapping[str, Sequence[int]] | str | None = None
    random: int | None = None
    top_by: str | None = None
    count: int | None = None
    seed: int = 0


def check_choice(choice: Choice) -> None:
    """:class:`ConfigError` for what contradicts itself, or names nothing; what needs no store to be seen."""
    given = [name for name in ("features", "random", "top_by") if getattr(choice, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} each say which features are shown: give one of them")
    if choice.top_by is not None and choice.top_by not in get_args(Order):
        hint = alike(str(choice.top_by), get_args(Order))
        raise ConfigError([("top_by", f"must be firing, activation or logit, found {choice.top_by!r}{hint}")])
    if choice.count is not None and choice.top_by is None:
        raise ConfigError([("count", "says how many features top_by takes, and that is not given")])
    for name in ("random", "count"):
        value = getattr(choice, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError([(name, f"must be a whole number of 1 or more, found {value!r}")])
    if isinstance(choice.features, str) and choice.features != "all":
        raise ConfigError([("features", f'must be numbers of features or "all", found {choice.features!r}')])
    if choice.features is not None and not len(choice.features):
        raise ConfigError([("features", "names none: there would be nothing to show")])


def chosen(sae: SAEFeatures, choice: Choice) -> list[Feature]:
    """The features of a page, in the order in which it has them: at least one.

    Those that are numbered, in the order given; ``random`` of those that fire, by number; or ``count`` of those that
    fire most often, most strongly, or raise a logit most.  :class:`ConfigError` for what is not there.
    """
    found = _chosen(sae, choice)
    if not found:
        raise ConfigError(
            f"none of the {len(sae):,} features of {sae.name} in the store fires on a token of the text, so there is "
            "none to choose; name some by number (features), or collect them on more text"
        )
    if len(found) > _MOST:
        raise ConfigError(
            f"a page of {len(found):,} features would be too large for a browser: choose up to {_MOST:,} of them "
            "(features, random, top_by)"
        )
    return found


def _chosen(sae: SAEFeatures, choice: Choice) -> list[Feature]:
    if choice.top_by is not None:
        return _ordered(sae, choice.top_by, choice.count or _DEFAULT)
    numbers = choice.features
    if isinstance(numbers, Mapping):
        numbers = numbers.get(sae.name)
    if numbers is None:
        return _drawn(sae, choice.random or _DEFAULT, choice.seed)
    if isinstance(numbers, str):
        numbers = sae.indices.tolist()
    if odd := [one for one in numbers if isinstance(one, bool) or not isinstance(one, (int, np.integer))]:
        raise ConfigError([("features", f'must be numbers of features or "all", found {odd[0]!r}')])
    return [sae.feature(int(number), "features") for number in dict.fromkeys(numbers)]


def _drawn(sae: SAEFeatures, n: int, seed: int) -> list[Feature]:
    """``n`` of those that fire, drawn at random, by number; all of them where there are no more."""
    alive = np.flatnonzero(sae.fired > 0)
    picked = np.sort(np.random.default_rng(seed).choice(alive, min(n, len(alive)), replace=False))
    return [sae.feature(int(sae.indices[row])) for row in picked]


def _ordered(sae: SAEFeatures, by: str, n: int) -> list[Feature]:
    """``n`` of those that fire: that fire most often, most strongly, or raise a logit most."""
    values = _values(sae, by)
    rows = np.argsort(-values, kind="stable")
    rows = rows[sae.fired[rows] > 0][:n]
    return [sae.feature(int(sae.indices[row])) for row in rows]


def _max_logits(sae: SAEFeatures) -> NDArray[np.float64]:
    """``[n]``: by how much each feature of the store raises the logit that it raises most."""
    if sae.why_no_logits is not None:
        raise ConfigError([("top_by", f"cannot be 'logit' for {sae.name}: {sae.why_no_logits}")])
    return sae.table("logits", "high").astype(np.float64)


def _values(sae: SAEFeatures, by: str) -> NDArray[np.float64]:
    if by == "logit":
        return _max_logits(sae)
    return sae.firing_fraction if by == "firing" else sae.maximum
