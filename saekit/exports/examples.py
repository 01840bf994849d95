"""Which windows of a feature are shown to others, and how their tokens and numbers are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import DataError
from saekit.exports.settings import Choice
from saekit.features.feature import Feature
from saekit.features.tables import SAETables, StoreFiles
from saekit.features.windows import Window

__all__ = [
    "OUT_OF_RANGE",
    "Group",
    "Texts",
    "begins_with_bos",
    "groups",
    "numbers_of_feature",
    "rounded",
    "strict_json",
]

OUT_OF_RANGE = "<|outofrange|>"
_RAW = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t"}
_MOST_AT_ONCE = 1 << 12


@attrs.frozen
class Group:
    """The windows with the largest activations, or those drawn from one interval."""

    low: float
    """The least activation of the interval; -1 for the largest activations, which are none."""
    high: float
    share: float
    """The fraction of the tokens that are in the interval; likewise -1."""
    windows: Sequence[Window]


def begins_with_bos(sae: SAETables) -> bool:
    """Whether every context begins with the model's BOS, put there as the SAE wants it.

    An SAE that says that no BOS is put before its contexts (``prepend_bos``) takes one for a token of the text.
    """
    bos = sae.store.manifest.model.get("bos")
    wanted = sae.about.metadata.get("prepend_bos") is not False
    return wanted and bos is not None and bool((sae.store.contexts[:, 0] == bos).all())


def groups(feature: Feature, choice: Choice, *, from_position: int = 0) -> list[Group]:
    """The largest first, then the quantiles from high to low; none of what is never above zero.

    No window is about a token before ``from_position``.
    """

    def shown(windows: Sequence[Window]) -> list[Window]:
        return [one for one in windows if one.start + one.at >= from_position]

    if feature.maximum <= 0:
        return []
    limit = len(feature.values) if feature.complete else feature.sae.top_kept
    largest = _enough(lambda n: [feature.top(min(n, limit), choice.window)], [choice.top], shown)[0]
    found = [Group(-1.0, feature.maximum, -1.0, largest)]
    if not choice.quantiles:
        return found

    def drawn(n: int) -> list[Any]:
        return feature.quantiles(choice.quantiles, n, choice.seed, choice.window)

    quantiles = drawn(choice.per_quantile)
    windows = [shown(one.windows) for one in quantiles]
    if any(len(some) < len(one.windows) for some, one in zip(windows, quantiles, strict=True)):
        wanted = [choice.per_quantile] * len(quantiles)
        windows = _enough(lambda n: [one.windows for one in drawn(n)], wanted, shown)
    return found + [
        Group(one.low, one.high, one.share, some) for one, some in zip(quantiles, windows, strict=True) if some
    ]


def _enough(
    draw: Callable[[int], Sequence[Sequence[Window]]],
    wanted: Sequence[int],
    shown: Callable[[Sequence[Window]], list[Window]],
) -> list[list[Window]]:
    """As many as are ``wanted`` of those that are shown, from more and more that are drawn, while there are more."""
    n = max(wanted, default=0)
    while True:
        found = draw(n)
        kept = [shown(some) for some in found]
        short = [len(some) < one for some, one in zip(kept, wanted, strict=True)]
        more = any(lacks and len(some) >= n for lacks, some in zip(short, found, strict=True))
        if not more or n >= _MOST_AT_ONCE:
            return [some[:one] for some, one in zip(kept, wanted, strict=True)]
        n *= 2


class Texts:
    """The texts of tokens as Neuronpedia shows them."""

    def __init__(self, store: StoreFiles) -> None:
        stored = list(store.vocabulary)
        texts = stored.copy()
        while texts and not texts[-1]:  # with which a vocabulary is filled up to a round number
            texts.pop()
        raw = any(text[:1] == "Ġ" for text in texts) and not any(text[:1] == " " for text in texts)
        if raw:  # the strings of a byte-level vocabulary, as they are in its file
            texts = ["".join(_RAW.get(letter, letter) for letter in text) for text in texts]
        self._texts, self._as_stored = texts, texts == stored

    def of(self, ids: Sequence[int]) -> list[str]:
        """Of token ids; of those beyond the vocabulary ``<|outofrange|>``."""
        known, number = self._texts, len(self._texts)
        return [known[one] if 0 <= one < number else OUT_OF_RANGE for one in ids]

    def of_window(self, window: Window, cut: int = 0) -> list[str]:
        """Of a window without its first ``cut`` tokens."""
        return [*window.tokens[cut:]] if self._as_stored else self.of(window.ids[cut:])


def rounded(values: object, digits: int) -> list[float]:
    """As plain numbers with so many decimals, none of them -0."""
    array: NDArray[np.float64] = np.asarray(values, np.float64)
    found: list[float] = (np.round(array, digits) + 0.0).tolist()
    return found


def strict_json(table: object, what: Callable[[], str]) -> str:
    """As JSON that every reader takes; :class:`DataError` for NaN and infinite numbers, in ``what``."""
    try:
        return json.dumps(table, allow_nan=False)
    except ValueError as error:
        raise DataError(
            f"{what()} cannot be written: it holds a number that is not finite, which JSON has not"
        ) from error


def numbers_of_feature(feature: Feature, digits: int, *, rows: int, logits: int, texts: Texts) -> dict[str, Any]:
    """The tables, logits and histograms of a feature, by the names that all of Neuronpedia's schemas have for them.

    ``correlated_*_l1`` are cosines, whatever their name: that is what is written and read there.
    """
    aligned = feature.alignment()[:rows]
    found: dict[str, Any] = {
        "neuron_alignment_indices": [index for index, _, _ in aligned],
        "neuron_alignment_values": rounded([value for _, value, _ in aligned], digits),
        "neuron_alignment_l1": rounded([share for _, _, share in aligned], digits),
    }
    for name, partners in (("neurons", feature.neurons()[:rows]), ("features", feature.partners("pearson")[:rows])):
        found[f"correlated_{name}_indices"] = [one.index for one in partners]
        found[f"correlated_{name}_pearson"] = rounded([one.pearson for one in partners], digits)
        found[f"correlated_{name}_l1"] = rounded([one.cosine for one in partners], digits)
    promoted = feature.logits
    for name, ends in (("neg", promoted and promoted.bottom), ("pos", promoted and promoted.top)):
        some = [*(ends or ())][:logits]
        found[f"{name}_str"] = texts.of([token for token, _, _ in some])
        found[f"{name}_values"] = rounded([value for _, _, value in some], digits)
    found["frac_nonzero"] = rounded(feature.firing_fraction, 5)
    of_logits = None if promoted is None else promoted.histogram
    for name, histogram in (("freq", feature.histogram()), ("logits", of_logits)):
        found[f"{name}_hist_data_bar_values"] = [] if histogram is None else rounded(histogram.centers, digits)
        found[f"{name}_hist_data_bar_heights"] = [] if histogram is None else rounded(histogram.counts, digits)
    return found
