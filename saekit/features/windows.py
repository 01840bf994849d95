"""Stretches of text around a token, and the intervals of activations that they are drawn from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from saekit.errors import ConfigError
from saekit.plugins.text import printable, short

__all__ = ["Quantile", "Width", "Window", "check_count", "check_width", "first", "intervals", "span"]

Width: TypeAlias = tuple[int, int] | int | None
"""How many tokens before and after the one in the middle; a whole number: both; None: the whole context."""


@attrs.frozen(repr=False)
class Window:
    """A stretch of a context around one token; at its ends the window is shorter, and nothing is filled in."""

    context: int
    """The number of the context in the store."""
    start: int
    """The position of its first token in the context."""
    at: int
    """Which of the tokens it is about, counted in the window."""
    ids: Sequence[int]
    """The tokens' ids."""
    tokens: Sequence[str]
    """The text of each."""
    values: Sequence[float]
    """The feature's activation on each; 0 where a token does not count."""
    counted: Sequence[bool]
    """Which tokens count (see :class:`saekit.tokens.TokenChoice`)."""

    @property
    def position(self) -> int:
        """The position, in the context, of the token that it is about."""
        return self.start + self.at

    @property
    def value(self) -> float:
        """The activation there."""
        return self.values[self.at]

    @property
    def token(self) -> str:
        """The text of that token."""
        return self.tokens[self.at]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.tokens)

    def __repr__(self) -> str:
        before, after = ("".join(part) for part in (self.tokens[: self.at], self.tokens[self.at + 1 :]))
        marked = f"{before}⟦{self.token}⟧{after}".replace("\n", "⏎")
        return printable(f"Window({self.value:.4g} at {self.context}:{self.position}: {marked})")


@attrs.frozen(repr=False)
class Quantile:
    """An interval of activations, and windows drawn from it."""

    number: int
    """From 0, the lowest, up."""
    low: float
    """The least activation that is in it."""
    high: float
    """The largest that is in it."""
    share: float
    """The fraction of all tokens that count, those with an activation of 0 among them, that are in it."""
    windows: Sequence[Window]

    def __repr__(self) -> str:
        what = f"{self.low:.4g} to {self.high:.4g}: {self.share:.2%} of tokens"
        return f"Quantile({self.number}, {what}, {len(self.windows)} windows)"


def intervals(maximum: float, n: int) -> list[tuple[float, float]]:
    """``n`` intervals of one width from 0 to ``maximum``, the lowest first; a bound belongs to both (sae_vis)."""
    bounds = [0.0, *(maximum * i / n for i in range(1, n)), maximum]  # the last one without rounding
    return [*itertools.pairwise(bounds)]


def check_width(window: object) -> None:
    """:class:`ConfigError` for what is no :data:`Width`."""
    if window is None or (type(window) is int and window >= 0):
        return
    fits = isinstance(window, (tuple, list)) and len(window) == 2
    if not fits or any(type(n) is not int or n < 0 for n in window):  # type: ignore[attr-defined]
        raise ConfigError(
            [("window", f"must be two whole numbers of 0 or more, tokens before and after, one for both, or None for "
              f"the whole context; found {window!r}")]
        )  # fmt: skip


def check_count(name: str, value: object, least: int = 0, most: int | None = None) -> None:
    """:class:`ConfigError` for what is no whole number from ``least`` to ``most``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if whole and value >= least and (most is None or value <= most):  # type: ignore[operator]
        return
    bounds = f"of {least} or more" if most is None else f"from {least} to {most:,}"
    raise ConfigError([(name, f"must be a whole number {bounds}, found {short(value)}")])


def first(n: int | None) -> int | None:
    """How many are taken; None: all."""
    if n is not None:
        check_count("n", n)
    return n


def span(position: int, length: int, window: Width) -> tuple[int, int]:
    """The first position of the window around ``position`` in a context of ``length`` tokens, and the one after it."""
    if window is None:
        return 0, length
    before, after = (window, window) if isinstance(window, int) else window
    return max(position - before, 0), min(position + after + 1, length)


def distinct(order: NDArray[np.int64], contexts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first of ``order`` in each context."""
    _, first = np.unique(contexts[order], return_index=True)
    return order[np.sort(first)]
