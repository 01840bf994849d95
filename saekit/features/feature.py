"""One feature of a store: what it fires on, with what else, and what it does to the output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.cautions import warn
from saekit.errors import ConfigError
from saekit.features.tables import SAETables
from saekit.features.windows import Quantile, Width, Window, check_count, check_width, distinct, first, intervals, span
from saekit.plugins.text import printable
from saekit.tables import facts_html

__all__ = ["BINS", "Feature", "Histogram", "Logits", "Partner"]

BINS = 50
_T = TypeVar("_T")


@attrs.frozen(eq=False)
class Histogram:
    """Counts in bins of one width."""

    edges: NDArray[np.float64]
    """``[bins + 1]``: where bins begin and end."""
    counts: NDArray[np.int64]
    """``[bins]``."""

    @property
    def centers(self) -> NDArray[np.float64]:
        """``[bins]``."""
        return (self.edges[:-1] + self.edges[1:]) / 2


@attrs.frozen
class Partner:
    """A feature or a neuron that is active together with a feature."""

    index: int
    """The number of the other feature, or of the coordinate of the SAE's input."""
    pearson: float
    """The correlation of both over all tokens that count."""
    cosine: float
    """The cosine of both as vectors of all tokens that count."""
    jaccard: float | None = None
    """Of features: tokens on which both fire, as a fraction of those on which either does."""


@attrs.frozen(eq=False, repr=False)
class Logits:
    """What an activation of 1 adds to the logits on the direct path, ``d W_U``, past the last normalization."""

    top: Sequence[tuple[int, str, float]]
    """Tokens that it raises most: id, text, and by how much, the largest first."""
    bottom: Sequence[tuple[int, str, float]]
    """Those that it lowers most, the lowest first."""
    histogram: Histogram
    """Over the vocabulary."""
    mean: float
    std: float

    def __repr__(self) -> str:
        raised, lowered = (" ".join(repr(text) for _, text, _ in some[:3]) for some in (self.top, self.bottom))
        return f"Logits(raises {raised} ..., lowers {lowered} ...; mean {self.mean:.3g}, std {self.std:.3g})"

    def _repr_html_(self) -> str:
        facts = [(f"{how} {printable(text)!r}", f"{by:+.3f}")
                 for how, some in (("raises", self.top), ("lowers", self.bottom)) for _, text, by in some]  # fmt: skip
        return facts_html("Logits", [*facts, ("mean, std", f"{self.mean:.3g}, {self.std:.3g}")])


@attrs.frozen(eq=False, slots=False, repr=False)
class Feature:
    """A feature of an SAE in a store.  Everything is read when it is asked for."""

    sae: SAETables
    index: int
    """Its number in the SAE."""
    _row: int = attrs.field(repr=False)
    """Its place in the tables of the store."""

    def __repr__(self) -> str:
        often = f"fires on {self.firing_fraction:.3%} of tokens, at most {self.maximum:.4g}"
        return f"Feature({self.index} of {self.sae.name!r}: {'fires on no token' if self.dead else often})"

    def _repr_html_(self) -> str:
        facts = [("fires on", f"{self.firing_fraction:.3%} of tokens"), ("at most", f"{self.maximum:.4g}")]
        if (logits := self.logits) is not None:
            facts += [(how, " ".join(repr(text) for _, text, _ in some[:8]))
                      for how, some in (("raises", logits.top), ("lowers", logits.bottom))]  # fmt: skip
        facts += [("text", repr(window)) for window in self.top(min(3, max(self.sae.top_kept, 1)))]
        return facts_html(f"Feature {self.index} of {self.sae.name}", [(name, printable(text)) for name, text in facts])

    # ---- numbers

    @property
    def fired(self) -> int:
        """Tokens on which it is not zero, of those that count."""
        return int(self.sae.fired[self._row])

    @property
    def firing_fraction(self) -> float:
        """The fraction of the tokens that count on which it is not zero."""
        return self.fired / self.sae.tokens_counted

    @property
    def dead(self) -> bool:
        """Whether it fires on no token of the store."""
        return self.fired == 0

    @property
    def maximum(self) -> float:
        """The largest activation; 0 for one that never fires."""
        return float(self.sae.maximum[self._row])

    @property
    def minimum(self) -> float:
        """The least activation that is not zero; 0 for one that never fires."""
        return float(self.sae.minimum[self._row])

    @property
    def mean(self) -> float:
        """The mean over all tokens that count."""
        return float(self.sae.table("index", "total")[self._row]) / self.sae.tokens_counted

    def histogram(self, bins: int = BINS) -> Histogram:
        """Of the activations that are not zero: ``bins`` of one width from the least to the largest.

        With other than 50 bins, it is made of the activations that are stored, which must be all.
        """
        check_count("bins", bins, 1)
        edges = np.linspace(self.minimum, self.maximum, bins + 1)
        if bins == BINS:
            return Histogram(edges, self.sae.table("index", "histogram")[self._row].astype(np.int64))
        if not self.complete:
            raise ConfigError([("bins", f"must be {BINS}: of feature {self.index} a sample is stored, not all")])
        return Histogram(edges, binned(self.values, edges))

    # ---- activations

    @property
    def complete(self) -> bool:
        """Whether all its activations are stored; else a fair sample of contexts, and those with the largest."""
        return len(self.values) == self.fired

    @cached_property
    def _entries(self) -> tuple[NDArray[Any], ...]:
        return self.sae.entries(self._row)

    @property
    def contexts(self) -> NDArray[np.int64]:
        """``[entries]``: the context of each activation that is stored; it rises."""
        return self._entries[0]

    @property
    def positions(self) -> NDArray[np.int64]:
        """``[entries]``: the position of each."""
        return self._entries[1]

    @property
    def values(self) -> NDArray[np.float32]:
        """``[entries]``: the activations; those of an SAE in float64 are float64."""
        return self._entries[2]

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """``[entries]``: which are in the fair sample; all, where all are stored."""
        sampled = self._entries[3]
        return np.ones_like(sampled) if self.complete else sampled

    def window(self, context: int, position: int, window: Width = (5, 5)) -> Window:
        """The text around a token, with the activations.

        :class:`ConfigError` for a place that the text has not, and where a sample is stored that has not this context.
        """
        check_width(window)
        store = self.sae.store
        check_count("context", context, 0, store.n_contexts - 1)
        check_count("position", position, 0, store.context_size - 1)
        if not self.complete and context not in self.contexts:
            raise ConfigError(
                [("context", f"{context} is not in the sample that is stored of feature {self.index}, which fires on "
                  f"{self.fired:,} tokens: feature.contexts lists those that are; all are stored with a larger "
                  "max_per_feature")]
            )  # fmt: skip
        return self._window(context, position, window)

    def top(self, n: int = 20, window: Width = (5, 5), *, distinct_contexts: bool = False) -> list[Window]:
        """Windows around the ``n`` largest activations above zero, the largest first.

        Of equal ones the first in the text come first.  ``distinct_contexts`` takes the largest of each context only.
        """
        check_width(window)
        check_count("n", n)
        if not self.complete and n > self.sae.top_kept:
            raise ConfigError(
                [("n", f"must be {self.sae.top_kept} or less for feature {self.index}, which fires on {self.fired:,} "
                  f"tokens; found {n}. More of the largest are stored with top_kept={n}")]
            )  # fmt: skip
        order = np.argsort(-self.values, kind="stable")
        order = order[self.values[order] > 0]
        order = distinct(order, self.contexts) if distinct_contexts else order
        return [self._window(int(self.contexts[i]), int(self.positions[i]), window) for i in order[:n]]

    def quantiles(
        self, n: int = 5, per: int = 5, seed: int = 0, window: Width = (5, 5), *, zeros: bool = True
    ) -> list[Quantile]:
        """``n`` intervals from 0 to the maximum, the highest first, with up to ``per`` windows drawn from each.

        Interval ``i`` is ``[maximum i/n, maximum (i + 1)/n]`` with both bounds, as in sae_vis.  Tokens are drawn at
        random, without replacement, by ``seed``; those on which the feature is zero are among them in the lowest
        one, unless ``zeros`` is off.  Nothing for a feature that is never above zero.
        """
        check_width(window)
        check_count("n", n, 1)
        check_count("per", per)
        if self.maximum <= 0:
            return []
        found = []
        for number, (low, high) in enumerate(intervals(self.maximum, n)):
            generator = np.random.default_rng([seed, self.index, number])
            share, places = self._drawn(low, high, per, generator, zeros)
            windows = [self._window(context, position, window) for context, position in places]
            found.append(Quantile(number, low, high, share, windows))
        return found[::-1]

    def _drawn(
        self, low: float, high: float, n: int, generator: np.random.Generator, zeros: bool
    ) -> tuple[float, list[tuple[int, int]]]:
        """The share of tokens in an interval, and some places."""
        values = self.values.astype(np.float64)
        inside = (values >= low) & (values <= high)
        whole = self.complete or low > self.sae.complete_above(self._row)  # then all that are in it are stored
        pool = np.flatnonzero(inside if whole else inside & self.sampled)
        all_of_it = len(pool) if whole else len(pool) * self.fired / max(int(self.sampled.sum()), 1)
        with_zero = low <= 0 <= high
        none = self.sae.tokens_counted - self.fired if with_zero else 0
        share = (all_of_it + none) / self.sae.tokens_counted
        blanks = self._zero_places() if with_zero and zeros and none else None
        number = len(pool) + (0 if blanks is None else len(blanks))
        picked = generator.choice(number, min(n, number), replace=False)
        size = self.sae.store.context_size
        flat = [self._places[pool[i]] if blanks is None or i < len(pool) else blanks[i - len(pool)] for i in picked]
        return share, [divmod(int(place), size) for place in flat]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """``[entries]``: each as one number, which rises."""
        return self.contexts * self.sae.store.context_size + self.positions

    def _zero_places(self) -> _Others:
        """The tokens that count and on which it is zero, of the contexts of which all is stored."""
        counted, fires = self.sae.counted_places, self._places
        if not self.complete:
            chosen = np.isin(counted // self.sae.store.context_size, self.contexts[self.sampled])
            counted, fires = counted[chosen], fires[self.sampled]
        return _Others(counted, np.searchsorted(counted, fires))

    def _window(self, context: int, position: int, window: Width) -> Window:
        store = self.sae.store
        start, stop = span(position, store.context_size, window)
        ids = store.contexts[context, start:stop].tolist()
        values = np.zeros(store.context_size, self.values.dtype)
        first, last = np.searchsorted(self.contexts, [context, context + 1])
        values[self.positions[first:last]] = self.values[first:last]
        return Window(
            context=context,
            start=start,
            at=position - start,
            ids=tuple(ids),
            tokens=tuple(store.texts(ids)),
            values=tuple(values[start:stop].tolist()),
            counted=tuple(self.sae.kept[context, start:stop].tolist()),
        )

    # ---- what it is active with, and what it writes

    def partners(self, by: Literal["pearson", "jaccard"] = "pearson", n: int | None = None) -> list[Partner]:
        """The features of the same SAE that fire most together with it, the strongest first.

        Of all features of the SAE, whichever of them are in the store; as many as were asked for when it was made
        (``partners``), of which a ``UserWarning`` tells where ``n`` is more.
        """
        if by not in ("pearson", "jaccard"):
            raise ConfigError([("by", f"must be 'pearson' or 'jaccard', found {by!r}; each of them has its "
              "cosine, and neighbors() are by that of directions")])  # fmt: skip
        return self._strongest(self._partners(f"features_by_{by}"), n)

    def neurons(self, n: int | None = None) -> list[Partner]:
        """The coordinates of the SAE's input that correlate most with it, the strongest first."""
        return self._strongest(self._partners("neurons"), n)

    def alignment(self, n: int | None = None) -> list[tuple[int, float, float]]:
        """The largest coordinates of its decoder direction: number, value, and share of the direction's L1 norm.

        None of a direction that is zero.
        """
        numbers, values, shares = (self.sae.table("weights", f"alignment_{x}") for x in ("index", "value", "share"))
        row = zip(numbers[self._row].tolist(), values[self._row].tolist(), shares[self._row].tolist(), strict=True)
        return self._strongest([one for one in row if one[0] >= 0], n)

    def neighbors(self, n: int | None = None) -> list[tuple[int, float]]:
        """The features whose decoder directions are most like its own, with the cosine, the most alike first.

        None of a direction that is zero.
        """
        numbers, cosines = self.sae.table("weights", "neighbor_index"), self.sae.table("weights", "neighbor_cos")
        row = zip(numbers[self._row].tolist(), cosines[self._row].tolist(), strict=True)
        return self._strongest([one for one in row if one[0] >= 0], n)

    def head_shares(self) -> list[float] | None:
        """Of the norms of its decoder direction at each head, which add up to 1; None where no heads lie side by side.

        A feature whose direction is zero has zeros.
        """
        tables = self.sae.tables("weights")
        return tables["head_shares"][self._row].tolist() if "head_shares" in tables else None

    @property
    def logits(self) -> Logits | None:
        """What it does to the logits; None where nothing can be said of that (``sae.why_no_logits``)."""
        if self.sae.why_no_logits is not None:
            return None
        of = {name: values[self._row] for name, values in self.sae.tables("logits").items()}
        texts = self.sae.store.texts
        top, bottom = (
            tuple(zip(of[f"{end}_ids"].tolist(), texts(of[f"{end}_ids"].tolist()), of[end].tolist(), strict=True))
            for end in ("top", "bottom")
        )
        edges = np.linspace(float(of["low"]), float(of["high"]), len(of["histogram"]) + 1)
        return Logits(top, bottom, Histogram(edges, of["histogram"]), float(of["mean"]), float(of["std"]))

    def _strongest(self, found: list[_T], n: int | None) -> list[_T]:
        """The first ``n``, with a warning where the store keeps fewer."""
        kept = int(self.sae.store.manifest.options.get("partners", 0))
        if n is not None and first(n) is not None and n > kept == len(found):
            told = f"the store keeps the {kept:,} strongest of each feature, and {n:,} are asked for: "
            warn(f"{told}saekit.collect_features(..., partners={n}) keeps more")
        return found[:n]

    def _partners(self, which: str) -> list[Partner]:
        tables = self.sae.tables("together")
        numbers = tables[f"{which}_index"][self._row]
        pearson, cosine = (tables[f"{which}_{name}"][self._row].tolist() for name in ("pearson", "cos"))
        jaccard = (
            tables[f"{which}_jaccard"][self._row].tolist() if f"{which}_jaccard" in tables else [None] * len(numbers)
        )
        rows = zip(numbers.tolist(), pearson, cosine, jaccard, strict=True)
        return [Partner(index, *measures) for index, *measures in rows if index >= 0]


class _Others:
    """Those of ``whole`` that are not at the rising ``places``, without a list of them."""

    def __init__(self, whole: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        self._all, self._gaps = whole, places - np.arange(len(places))

    def __len__(self) -> int:
        return len(self._all) - len(self._gaps)

    def __getitem__(self, number: int) -> int:
        return int(self._all[number + np.searchsorted(self._gaps, number, side="right")])


def binned(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of ``values`` are in each of the bins, which are of one width; all of them are in one."""
    bins = len(edges) - 1
    low, high = float(edges[0]), float(edges[-1])
    width = (high - low) / bins
    scaled = (values.astype(np.float64) - low) / width if width > 0 else np.zeros(len(values))
    places = np.clip(scaled.astype(np.int64), 0, bins - 1)
    return np.bincount(places, minlength=bins)
