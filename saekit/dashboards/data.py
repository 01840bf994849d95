"""What a page says of features, as plain data that JSON can hold: made of a feature store, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.features.feature import Feature, Histogram, Logits, Partner
from saekit.features.tables import SAETables
from saekit.features.windows import Quantile, Width, Window, check_width

__all__ = ["EffectKind", "Effects", "Look", "feature_data", "index_data", "sae_data", "shown_windows"]

EffectKind = Literal["exact", "direct path"]
_TOKENS_OF_INDEX = 10
"""Texts of each feature that can be searched for: those it fires on most, and those that it raises most."""


class Effects(Protocol):
    """What removing a feature does to the loss."""

    @property
    def kind(self) -> EffectKind:
        """``exact``: by a spliced forward of the model; ``direct path``: through the last normalization alone."""

    def __call__(self, feature: Feature, windows: Sequence[Window]) -> Sequence[Sequence[float | None]]:
        """For each window and each of its tokens: the change, in nats, of the loss at the *next* token of the context
        when the feature is removed from the context; None where it is not known."""


@attrs.frozen(kw_only=True)
class Look:
    """How much of a feature a page shows."""

    top: int = 20
    """Windows around the largest activations."""
    quantiles: int = 5
    """Intervals from 0 to the maximum from which windows are drawn."""
    per_quantile: int = 5
    """Windows drawn from each."""
    window: Width = (10, 10)
    """Tokens before and after the one that a window is about; None: the whole context."""
    seed: int = 0
    """For what is drawn."""
    logits: int = 10
    """Tokens that it raises most, and that it lowers most."""
    rows: int = 5
    """Features and neurons that go with it, in each table."""

    def __attrs_post_init__(self) -> None:
        for name, least in (("top", 0), ("quantiles", 1), ("per_quantile", 0), ("seed", 0), ("logits", 0), ("rows", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError([(name, f"must be a whole number of {least} or more, found {value!r}")])
        check_width(self.window)


def feature_data(
    feature: Feature, look: Look | None = None, *, effects: Effects | None = None, label: str | None = None
) -> dict[str, Any]:
    """All that a page says of a feature.

    ``index``, ``label``; ``fired``, ``firing_fraction``, ``maximum``, ``minimum``, ``mean``, ``dead``; ``complete``
    and ``stored`` (whether all activations are in the store, and how many are); ``top``: windows; ``quantiles``: a
    mapping with ``number``, ``low``, ``high``, ``share`` and ``windows`` for each, the highest first; ``firing``: the
    histogram of the activations that are not zero, with ``low``, ``high`` and ``counts``, or None; ``logits``: ``top``
    and ``bottom`` as ``[id, text, value]``, ``histogram``, ``mean``, ``std``, or None; ``alignment`` as ``[coordinate,
    value, share]``; ``neurons`` as ``[coordinate, pearson, cosine]``; ``partners`` (by correlation) and ``together``
    (by Jaccard) as ``[feature, pearson, cosine, jaccard]``; ``neighbors`` as ``[feature, cosine]``;
    ``loss_effect_kind``: ``exact``, ``direct path`` or None.

    A window has ``context``, ``start`` (the position of its first token in it), ``at`` (which token it is about),
    ``ids``, ``tokens`` (texts), ``values`` (activations), ``counted`` (1 where a token counts), and ``loss_effects``:
    the change, in nats, of the loss at the next token when the feature is removed from the context, or None; without
    ``effects``, it has none.  Numbers have 4 to 6 digits; one that is not finite is None.
    """
    look = look or Look()
    top, drawn = shown_windows(feature, look)
    windows = [*top, *(window for quantile in drawn for window in quantile.windows)]
    found: Sequence[Sequence[float | None] | None] = [None] * len(windows)
    if effects is not None and windows:
        found = effects(feature, windows)
    shown = iter([_window(window, own) for window, own in zip(windows, found, strict=True)])
    return {
        "index": feature.index,
        "label": label,
        "fired": feature.fired,
        "firing_fraction": _number(feature.firing_fraction),
        "maximum": _number(feature.maximum),
        "minimum": _number(feature.minimum),
        "mean": _number(feature.mean),
        "dead": feature.dead,
        "complete": feature.complete,
        "stored": len(feature.values),
        "top": [next(shown) for _ in top],
        "quantiles": [
            {
                "number": one.number,
                "low": _number(one.low),
                "high": _number(one.high),
                "share": _number(one.share),
                "windows": [next(shown) for _ in one.windows],
            }
            for one in drawn
        ],
        "firing": None if feature.dead else _histogram(feature.histogram()),
        "logits": _logits(feature.logits, look.logits),
        "alignment": _rows(feature.alignment()[: look.rows]),
        "neurons": [row[:3] for row in _partners(feature.neurons()[: look.rows])],
        "partners": _partners(feature.partners("pearson")[: look.rows]),
        "together": _partners(feature.partners("jaccard")[: look.rows]),
        "neighbors": _rows(feature.neighbors()[: look.rows]),
        "loss_effect_kind": None if effects is None else effects.kind,
    }


def shown_windows(feature: Feature, look: Look) -> tuple[list[Window], list[Quantile]]:
    """The windows around its largest activations, and those that are drawn from intervals of them."""
    top = feature.top(look.top if feature.complete else min(look.top, feature.sae.top_kept), look.window)
    return top, feature.quantiles(look.quantiles, look.per_quantile, look.seed, look.window)


def index_data(
    sae: SAETables, features: Sequence[Feature], labels: Mapping[int, str] | None = None
) -> list[dict[str, Any]]:
    """What a list of features says of each, in the order given: ``index``, ``label``, ``firing_fraction``, ``maximum``,
    ``max_logit`` (None: nothing is known of logits), ``fires_on`` and ``raises``: texts of tokens, the strongest first,
    each once."""
    raised = None if sae.why_no_logits is not None else sae.tables("logits")
    rows = np.searchsorted(sae.indices, [feature.index for feature in features])
    found = []
    for feature, row in zip(features, rows.tolist(), strict=True):
        ids = [] if raised is None else raised["top_ids"][row][:_TOKENS_OF_INDEX].tolist()
        most = None if raised is None else float(raised["high"][row])
        found.append(
            {
                "index": feature.index,
                "label": (labels or {}).get(feature.index),
                "firing_fraction": _number(feature.firing_fraction),
                "maximum": _number(feature.maximum),
                "max_logit": None if most is None else _number(most),
                "fires_on": _once(sae.store.texts(_strongest(feature))),
                "raises": _once(sae.store.texts(ids)),
            }
        )
    return found


def sae_data(sae: SAETables) -> dict[str, Any]:
    """What a page says of an SAE: ``name``, ``architecture``, ``inputs`` and ``targets`` (names of sites), ``d_in``,
    ``d_sae``, ``in_store`` and ``dead`` (numbers of features), ``tokens_counted``, ``why_no_logits``."""
    about = sae.about
    return {
        "name": about.name,
        "architecture": about.architecture,
        "inputs": list(about.inputs),
        "targets": list(about.targets),
        "d_in": about.d_in,
        "d_sae": about.d_sae,
        "in_store": len(sae.indices),
        "dead": len(sae.dead),
        "tokens_counted": sae.tokens_counted,
        "why_no_logits": sae.why_no_logits,
    }


def _strongest(feature: Feature) -> list[int]:
    """Ids of the tokens that it fires on most strongly, each once."""
    values = feature.values
    order: NDArray[np.int64] = np.argsort(-values, kind="stable")
    order = order[values[order] > 0]
    ids = feature.sae.store.contexts[feature.contexts[order], feature.positions[order]]
    _, first = np.unique(ids, return_index=True)
    found: list[int] = ids[np.sort(first)[: 2 * _TOKENS_OF_INDEX]].tolist()  # some have one text
    return found


def _once(texts: Sequence[str]) -> list[str]:
    return [*dict.fromkeys(texts)][:_TOKENS_OF_INDEX]


def _window(window: Window, effects: Sequence[float | None] | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "context": window.context,
        "start": window.start,
        "at": window.at,
        "ids": list(window.ids),
        "tokens": list(window.tokens),
        "values": [_number(value) for value in window.values],
        "counted": [int(counted) for counted in window.counted],
    }
    if effects is not None:
        told["loss_effects"] = [None if value is None else _number(value, 3) for value in effects]
    return told


def _histogram(found: Histogram) -> dict[str, Any]:
    low, high = float(found.edges[0]), float(found.edges[-1])
    return {"low": _number(low, 6), "high": _number(high, 6), "counts": found.counts.tolist()}


def _logits(found: Logits | None, rows: int) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "top": _rows(found.top[:rows]),
        "bottom": _rows(found.bottom[:rows]),
        "histogram": _histogram(found.histogram),
        "mean": _number(found.mean),
        "std": _number(found.std),
    }


def _partners(found: Sequence[Partner]) -> list[list[Any]]:
    return _rows([(one.index, one.pearson, one.cosine, one.jaccard) for one in found])


def _rows(found: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[_number(value) if isinstance(value, float) else value for value in row] for row in found]


def _number(value: float, digits: int = 4) -> float | int | None:
    """A few digits, which is what can be seen; 0 in one character."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") or 0
