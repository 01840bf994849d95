"""One run of the model for several readers of the same text."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import attrs
from torch import Tensor

from saekit.protocols import ModelBackend, Replacement

__all__ = ["SharedForwards"]

_MOST_BYTES = 4_000_000_000


@attrs.define
class _Kept:
    held: dict[str, Tensor]
    awaited_by: set[int]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.held.values())


class SharedForwards:
    """Keeps what a forward gave until every reader has taken it, so that SAEs on streams of their own share forwards.

    Readers take the same contexts in the same order, some a little later than others.  What is kept is bounded: a
    forward that was forgotten is run again, which changes nothing but the time.
    """

    def __init__(self, backend: ModelBackend, most_bytes: int = _MOST_BYTES) -> None:
        self._backend, self._most_bytes = backend, most_bytes
        self._hooks: set[str] = set()
        self._readers = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def reader(self, hooks: Collection[str]) -> ModelBackend:
        """The model for one reader, which will read ``hooks``.  All readers must be there before the first forward."""
        self._hooks |= set(hooks)
        self._readers += 1
        return _Reader(self, self._backend, self._readers - 1)

    def take(self, reader: int, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        """What ``hooks`` hold for ``tokens [b, t]``."""
        if not set(hooks) <= self._hooks:
            return self._backend.activations(tokens, hooks)
        key = blake2b(tokens.cpu().numpy().tobytes() + repr(tuple(tokens.shape)).encode(), digest_size=16).digest()
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or reader not in kept.awaited_by:
                self._drop(key)
                kept = _Kept(self._backend.activations(tokens, self._hooks), set(range(self._readers)))
                self._keep(key, kept)
            kept.awaited_by.discard(reader)
            if not kept.awaited_by:
                self._drop(key)
            return {name: kept.held[name] for name in hooks}

    def _keep(self, key: bytes, kept: _Kept) -> None:
        self._kept[key] = kept
        self._bytes += kept.nbytes
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self._bytes -= kept.nbytes


class _Reader:
    """The backend, whose ``activations`` are shared."""

    name: str
    device: str
    n_ctx: int | None
    d_vocab: int
    special_tokens: Mapping[str, int | None]

    def __init__(self, shared: SharedForwards, backend: ModelBackend, number: int) -> None:
        self._shared, self._backend, self._number = shared, backend, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def hook_names(self) -> Sequence[str]:
        return self._backend.hook_names()

    def tokenize(self, text: str) -> list[int]:
        return self._backend.tokenize(text)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return self._backend.token_texts(tokens)

    def activations(self, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        return self._shared.take(self._number, tokens, hooks)

    def loss(self, tokens: Tensor, replacements: Mapping[str, Replacement] | None = None) -> Tensor:
        return self._backend.loss(tokens, replacements)
