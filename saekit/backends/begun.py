"""Forwards that begin: who is told of them, and of which token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from saekit.abilities import OnTokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Begun", "Running"]


class Begun:
    """Passes on what it is told, and keeps the shape of the tokens of the forward that each thread is in."""

    def __init__(self, on_tokens: OnTokens | None) -> None:
        self._on_tokens, self._now = on_tokens, threading.local()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """``b`` and ``t`` of the forward that runs now, where they are known."""
        shape: tuple[int, ...] | None = getattr(self._now, "shape", None)
        return shape

    def __call__(self, tokens: Tensor | None, before: int) -> Callable[[], None]:
        around = self.shape  # of the forward that this one is called in
        self._now.shape = None if tokens is None else tuple(tokens.shape)
        told = None if self._on_tokens is None else self._on_tokens(tokens, before)

        def ended() -> None:
            self._now.shape = around
            if told is not None:
                told()

        return ended


class Running:
    """The forwards of a backend's own, of which it knows the tokens, however it calls its model."""

    def __init__(self) -> None:
        self._now, self._told = threading.local(), ()

    _told: tuple[Begun, ...]

    @contextmanager
    def __call__(self, tokens: Tensor) -> Iterator[None]:
        """One of them: all who are to be told are told."""
        before, self._now.runs = getattr(self._now, "runs", False), True
        with ExitStack() as ends:
            ends.callback(setattr, self._now, "runs", before)
            for one in self._told:
                ends.callback(one(tokens, 0))
            yield

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

        def tell(tokens: Tensor | None, before: int) -> Callable[[], None] | None:
            return None if getattr(self._now, "runs", False) else begun(tokens, before)

        return tell
