"""Sums by contexts: of these everything that is measured is made, errors too.

A context is the unit that is resampled: tokens of one context are alike, so that errors by tokens would be too small.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["N_BOOTSTRAP", "Sums", "Totals", "ratio", "resamples"]

N_BOOTSTRAP = 1000
"""Resamples for standard errors, where nobody says how many."""
_BYTES = 1 << 25  # of the weights that are worked with at once

Array = NDArray[Any]


class Sums:
    """A table with a row for each context, and counts over all of them.

    Columns are sums over the positions of a context that count, ``[n]``, or vectors ``[n, d]``, all float64.  Counts
    are whole numbers, such as how often each feature fired.  ``facts`` are what all parts must have in common.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts: Mapping[str, Any] = facts
        self._numbers: list[Array] = []
        self._columns: dict[str, list[Array]] = {}
        self._counts: dict[str, Array] = {}
        self._ordered = True
        self._empty: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self._numbers))

    def __repr__(self) -> str:
        return f"Sums({len(self):,} contexts: {', '.join([*self._columns, *self._counts])})"

    def add(
        self, numbers: Sequence[int] | Array, columns: Mapping[str, Any], counts: Mapping[str, Any] | None = None
    ) -> None:
        """Take in contexts of these ``numbers``: ``columns`` are ``[b]`` or ``[b, d]``, ``counts`` whole numbers.

        :class:`ValueError` for a context that is there, and for other columns than there are.
        """
        added = np.array(numbers, dtype=np.int64)
        self._check_new(added)
        if self._numbers and set(columns) != set(self._columns):
            raise ValueError(f"columns must be {', '.join(self._columns)}, found {', '.join(columns)}")
        self._numbers.append(added)
        self._ordered = False
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(np.asarray(values).astype(np.float64))
        for name, values in (counts or {}).items():
            self._counts[name] = self._counts.get(name, 0) + np.asarray(values).astype(np.int64)

    def _check_new(self, numbers: Array) -> None:
        known = np.concatenate([numbers, *self._numbers])
        found, times = np.unique(known, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"context {found[times > 1][0]} is there twice; parts must have contexts of their own")

    def leave_out(self, numbers: Iterable[int]) -> None:
        """Say that no token of the contexts ``numbers`` counts: they are in no total, and are not drawn."""
        self._empty.update(int(number) for number in numbers)

    def merged(self, other: Sums) -> Sums:
        """The contexts of both, which must have none in common; either stays as it is.

        :class:`ValueError` for parts that do not belong together.
        """
        if not _alike(self.facts, other.facts):
            raise ValueError(f"parts of different measurements: {_shown(self.facts)} and {_shown(other.facts)}")
        whole = Sums(**self.facts)
        for part in (self, other):
            if len(part) or part._counts:
                columns = {name: _joined(values) for name, values in part._columns.items()}
                whole.add(_joined(part._numbers), columns, part._counts)
            whole.leave_out(part._empty)
        return whole

    @property
    def numbers(self) -> Array:
        """``[n]``: the contexts, in rising order."""
        return np.sort(_joined(self._numbers)).astype(np.int64)

    def _order(self) -> None:
        """Put all columns into the order of :attr:`numbers`, each in one piece, which takes the place of its parts."""
        if self._ordered:
            return
        numbers = _joined(self._numbers)
        order = np.argsort(numbers, kind="stable")
        moved = bool((np.diff(order) != 1).any())
        for parts in (self._numbers, *self._columns.values()):
            whole = _joined(parts)
            parts[:] = [whole[order] if moved else whole]
        self._ordered = True

    @property
    def counted(self) -> Array:
        """``[n]`` bool, in the order of :attr:`numbers`: which have a token that counts; errors are of these."""
        return ~np.isin(self.numbers, sorted(self._empty))

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the columns."""
        return tuple(self._columns)

    def column(self, name: str) -> Array:
        """``[n]`` or ``[n, d]``, in the order of :attr:`numbers`, whatever order they came in."""
        self._order()
        return self._columns[name][0]

    def count(self, name: str) -> Array:
        """``int64``: a count over all contexts."""
        return self._counts[name]

    def totals(self) -> Totals:
        """Over all contexts that count, each once."""
        return Totals(self, None)

    def resampled(self, n_bootstrap: int, seed: int = 0) -> Iterator[Totals]:
        """Over contexts that count and are drawn again, in portions of resamples; see :func:`resamples`."""
        counted = self.counted
        if not (n := int(counted.sum())):
            return
        for weights in resamples(n, n_bootstrap, seed):
            if n < len(counted):
                drawn, weights = weights, np.zeros((len(weights), len(counted)))
                weights[:, counted] = drawn
            yield Totals(self, weights)


def resamples(n: int, n_bootstrap: int, seed: int = 0) -> Iterator[Array]:
    """How often each of ``n`` contexts is drawn in each of ``n_bootstrap`` resamples: portions ``[r, n]``, float64.

    They depend on these three numbers alone: SAEs that were measured on the same contexts have the same resamples, so
    that their differences can be resampled, too.
    The bootstrap of Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    portion = max(_BYTES // (8 * max(n, 1)), 1)
    if not n_bootstrap:
        return
    if n_bootstrap <= portion:
        yield _drawn(n, n_bootstrap, seed)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, n_bootstrap, portion):
        yield _weights(generator, n, min(portion, n_bootstrap - start))


@functools.lru_cache(4)
def _drawn(n: int, n_bootstrap: int, seed: int) -> Array:
    """All at once, for the SAEs and evals to come."""
    found = _weights(np.random.default_rng(seed), n, n_bootstrap)
    found.flags.writeable = False
    return found


def _weights(generator: np.random.Generator, n: int, size: int) -> Array:
    return generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


class Totals:
    """Sums over contexts: as they are, or in ``r`` resamples.  Every number is an array ``[r]``."""

    def __init__(self, sums: Sums, weights: Array | None) -> None:
        self.sums = sums
        self._weights = sums.counted[None].astype(np.float64) if weights is None else weights

    def __getitem__(self, name: str) -> Array:
        """``[r]``, the total of a column; of a vector ``[r, d]``."""
        return self._weights @ self.sums.column(name)

    def spread(self, within: str, vector: str, count: str, columns: slice | None = None) -> Array:
        """``[r]``: ``Σ‖y − ȳ‖²`` over all rows ``y``, with ȳ their mean.

        Of each context there are the sum of its rows (``vector``, of which ``columns`` are looked at), how many there
        are (``count``), and the squares around its own mean (``within``).  What is between contexts is summed around
        the mean of all, so that no digits are lost where the mean is large.
        """
        rows, means = self.sums.column(count), self.sums.column(vector)[:, columns or slice(None)]
        off = means - rows[:, None] * (means.sum(0) / max(rows.sum(), 1))
        between = (off**2).sum(1) / np.maximum(rows, 1)
        together = ((self._weights @ off) ** 2).sum(1) / np.maximum(self._weights @ rows, 1)
        return self[within] + self._weights @ between - together  # type: ignore[no-any-return]


def ratio(part: Any, whole: Any) -> Array:
    """``part / whole``; nan where that is 0."""
    return np.where(whole != 0, part / np.where(whole != 0, whole, 1), np.nan)


def _joined(parts: Sequence[Array]) -> Array:
    """The parts as one array, which may be the only one of them."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0)


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _shown(facts: Mapping[str, Any]) -> str:
    known: Iterable[tuple[str, Any]] = facts.items()
    return ", ".join(f"{name}={value!r:.40}" for name, value in known) or "nothing said"
