"""The list of all features of a large SAE, as columns: a number for each in one list, and every text once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saekit.features.tables import SAETables

__all__ = ["fires_on_columns", "index_columns"]

_TEXTS = 10
"""Of each feature as many are searched as :func:`saekit.dashboards.data.index_data` gives."""
_LOOKED_AT = (16, 64)  # activations of each, at first


def index_columns(sae: SAETables, labels: Mapping[int, str] | None = None) -> dict[str, Any]:
    """What :func:`saekit.dashboards.data.index_data` says of all features, but for the tokens that they fire on.

    ``index``, ``firing_fraction``, ``maximum`` and ``max_logit`` (None: nothing is known of logits) are lists with a
    number for each; ``labels`` are by number; ``texts`` are texts of tokens, and ``raises`` has the places of some in
    it for each feature.
    """
    logits = None if sae.why_no_logits is not None else sae.tables("logits")
    ids: Iterable[Sequence[int]] = [()] * len(sae.indices)
    if logits is not None:
        ids = logits["top_ids"][:, :_TEXTS].tolist()
    vocabulary = sae.store.vocabulary
    texts, raises = _by_place(dict.fromkeys([vocabulary[number] for number in own]) for own in ids)
    return {
        "index": sae.indices.tolist(),
        "firing_fraction": _few_digits(sae.firing_fraction),
        "maximum": _few_digits(sae.maximum),
        "max_logit": None if logits is None else _few_digits(logits["high"]),
        "labels": {str(number): label for number, label in (labels or {}).items()},
        "texts": texts,
        "raises": raises,
    }


def fires_on_columns(sae: SAETables) -> dict[str, Any]:
    """``texts`` of tokens, and ``fires_on``: for each feature the places of those that it fires on most.

    It reads the activations of all features, which takes seconds where there are many.
    """
    contexts, vocabulary = sae.store.contexts, sae.store.vocabulary
    starts, tables = sae.table("index", "starts").tolist(), sae.tables("activations")
    places, positions, values = (tables[name] for name in ("contexts", "positions", "values"))
    found: list[dict[str, None]] = []
    for first, last in itertools.pairwise(starts):
        for most in (*_LOOKED_AT, last - first):  # more are looked at where few tokens come again and again
            order = first + _largest(values[first:last], most)
            ids = contexts[places[order], positions[order]].tolist()
            texts = dict.fromkeys([vocabulary[number] for number in ids])
            if most >= last - first or len(texts) >= _TEXTS:
                break
        found.append(texts)
    every, fires_on = _by_place(found)
    return {"texts": every, "fires_on": fires_on}


def _largest(values: NDArray[Any], most: int) -> NDArray[np.int64]:
    """The places of the ``most`` largest of ``values`` above zero, in falling order; of equal ones the first first."""
    places: NDArray[np.int64] = np.arange(len(values))
    if len(values) > 4 * most:
        least = np.partition(values, len(values) - most)[len(values) - most]
        places = np.flatnonzero(values >= least)
    some = values[places]
    order = np.argsort(-some, kind="stable")[:most]
    return places[order[some[order] > 0]]


def _by_place(texts: Iterable[Iterable[str]]) -> tuple[list[str], list[list[int]]]:
    """All that are needed of ``texts``, each once, and for each feature the places of its first ones."""
    places = dict[str, int]()
    found = [[places.setdefault(text, len(places)) for text in itertools.islice(own, _TEXTS)] for own in texts]
    return [*places], found


def _few_digits(values: NDArray[Any]) -> list[float | None]:
    """Four digits, which is what can be seen; None for what is no finite number."""
    return [float(f"{x:.4g}") or 0 if x - x == 0 else None for x in values.tolist()]
