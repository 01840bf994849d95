"""Forwards that begin: who is told of them, and of which token ids."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from saekit.abilities import OnTokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Begun", "Running"]


class Begun:
    """Passes on what it is told, and keeps the shape of the last tokens of each thread."""

    def __init__(self, on_tokens: OnTokens | None) -> None:
        self._on_tokens, self._now = on_tokens, threading.local()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """``b`` and ``t`` of the forward that runs now, where they are known."""
        shape: tuple[int, ...] | None = getattr(self._now, "shape", None)
        return shape

    def __call__(self, tokens: Tensor | None, before: int) -> None:
        self._now.shape = None if tokens is None else tuple(tokens.shape)
        if self._on_tokens is not None:
            self._on_tokens(tokens, before)


class Running:
    """The forwards of a backend's own, of which it knows the tokens, however it calls its model."""

    def __init__(self) -> None:
        self._now, self._told = threading.local(), ()

    _told: tuple[Begun, ...]

    @contextmanager
    def __call__(self, tokens: Tensor) -> Iterator[None]:
        """One of them: all who are to be told are told."""
        before, self._now.runs = getattr(self._now, "runs", False), True
        try:
            for one in self._told:
                one(tokens, 0)
            yield
        finally:
            self._now.runs = before

    @contextmanager
    def told(self, one: Begun) -> Iterator[None]:
        """While the context is open, ``one`` is told."""
        self._told = (*self._told, one)
        try:
            yield
        finally:
            self._told = tuple(other for other in self._told if other is not one)

    def unless_it_knows(self, begun: Begun) -> OnTokens:
        """``begun``, which is told of the forwards of others alone."""

        def tell(tokens: Tensor | None, before: int) -> None:
            if not getattr(self._now, "runs", False):
                begun(tokens, before)

        return tell
