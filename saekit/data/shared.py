"""One run of the model for several readers of the same text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import attrs
from torch import Tensor

from saekit.abilities import HasMemory, HasTokenizer, TokenizesElsewhere
from saekit.protocols import ModelBackend
from saekit.values import Forward, Replacement, Want

__all__ = ["MOST_KEPT", "ForwardsReader", "SharedForwards"]

MOST_KEPT = 4_000_000_000
"""Bytes of forwards that are kept, at most."""
_Key: TypeAlias = tuple[int | None, bytes]
"""The reader's position after the contexts, and their tokens."""


@attrs.define(eq=False)
class _Kept:
    held: Mapping[str, Tensor]
    awaited_by: list[ForwardsReader]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.held.values())


class SharedForwards:
    """Keeps what a forward gave until every reader has taken it, so that SAEs on streams of their own share forwards.

    Readers take the same contexts in the same order, some a little later than others.  A forward is kept only for
    readers that have still to come to its place in the text, and no more than ``most_bytes`` of them: what is not there
    is run again, which changes nothing but the time.
    """

    def __init__(self, backend: ModelBackend, most_bytes: int = MOST_KEPT) -> None:
        self._backend, self._most_bytes = backend, most_bytes
        self._readers: list[ForwardsReader] = []
        self._kept: dict[_Key, _Kept] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The memory of what is kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    def reader(self, hooks: Collection[str]) -> ForwardsReader:
        """The model for one reader, which will read ``hooks``."""
        self._readers.append(ForwardsReader(self, self._backend, hooks))
        return self._readers[-1]

    def take(self, reader: ForwardsReader, tokens: Tensor, hooks: Collection[str]) -> dict[str, Tensor]:
        """What ``hooks`` hold for ``tokens [b, t]``, which ``reader`` has come to."""
        shape = repr(tuple(tokens.shape)).encode()
        key = reader.position, blake2b(tokens.cpu().numpy().tobytes() + shape, digest_size=16).digest()
        with self._lock:
            self._forget(reader, before=key[0])
            reader.note(key)
            kept = self._kept.get(key)
            if kept is None or not set(hooks) <= set(kept.held):
                self._kept.pop(key, None)
                kept = self._run(key, reader, tokens, hooks)
            else:
                self._no_longer_awaited(key, reader)
            return {name: kept.held[name] for name in hooks}

    def release(self, reader: ForwardsReader) -> None:
        """Keep nothing for ``reader`` any more."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
            self._forget(reader)

    def _run(self, key: _Key, reader: ForwardsReader, tokens: Tensor, hooks: Collection[str]) -> _Kept:
        others = [other for other in self._readers if other is not reader and other.comes_to(key)]
        wanted = set(hooks).union(*(other.hooks for other in others))
        held = self._held(tokens, wanted)
        kept = _Kept(held, others)
        if others and self.nbytes + kept.nbytes <= self._most_bytes:  # else the oldest stay: they are needed first
            self._kept[key] = kept
        return kept

    def _held(self, tokens: Tensor, hooks: Collection[str]) -> Mapping[str, Tensor]:
        if self._kept:
            try:
                return self._backend.run(tokens, read=hooks).held
            except (MemoryError, RuntimeError):  # perhaps for want of the memory that is taken up here
                self._kept.clear()
        return self._backend.run(tokens, read=hooks).held

    def _forget(self, reader: ForwardsReader, before: int | None = None) -> None:
        """What ``reader`` has passed without taking it, as it may when its forwards are of another size; or all."""
        for key in list(self._kept):
            position = key[0]
            if before is None or (position is not None and position < before):
                self._no_longer_awaited(key, reader)

    def _no_longer_awaited(self, key: _Key, reader: ForwardsReader) -> None:
        kept = self._kept[key]
        if reader in kept.awaited_by:
            kept.awaited_by.remove(reader)
        if not kept.awaited_by:
            del self._kept[key]


class ForwardsReader:
    """The backend, whose forwards are shared where they only read; ``hooks`` are those that will be read."""

    name: str
    device: str
    n_ctx: int | None
    d_vocab: int
    special_tokens: Mapping[str, int | None]

    def __init__(self, shared: SharedForwards, backend: ModelBackend, hooks: Collection[str]) -> None:
        self._shared, self._backend, self.hooks = shared, backend, frozenset(hooks)
        self._find_position: Callable[[], int | None] = lambda: None
        self._taken: list[_Key] = []
        if isinstance(backend, HasTokenizer):  # what it can do beside the rest, this can, and no more
            self.tokenizer = backend.tokenizer
        if isinstance(backend, TokenizesElsewhere):
            self.tokenizing = backend.tokenizing
        if isinstance(backend, HasMemory):
            self.memory_bytes = backend.memory_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def follow(self, position: Callable[[], int | None]) -> None:
        """``position`` gives the contexts read so far, those in hand included; None: the text is not read."""
        self._find_position = position

    @property
    def position(self) -> int | None:
        """See :meth:`follow`."""
        return self._find_position()

    def note(self, key: _Key) -> None:
        """This reader takes what is at ``key``."""
        self._taken = [taken for taken in self._taken if taken[0] == key[0]] + [key]

    def comes_to(self, key: _Key) -> bool:
        """Whether this reader has not yet taken what is at ``key``, nor passed it."""
        place, own = key[0], self.position
        return place is not None and own is not None and own <= place and key not in self._taken

    def release(self) -> None:
        """This reader has all that it needs: nothing is kept for it any more.  It may still read."""
        self._shared.release(self)

    def hook_names(self) -> Sequence[str]:
        return self._backend.hook_names()

    def tokenize(self, text: str) -> list[int]:
        return self._backend.tokenize(text)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return self._backend.token_texts(tokens)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self._backend.unembedding()

    def fingerprint(self) -> str | None:
        return self._backend.fingerprint()

    def run(
        self,
        tokens: Tensor,
        *,
        read: Collection[str] = (),
        replace: Mapping[str, Replacement] | None = None,
        want: Want = "held",
        grad: bool = False,
    ) -> Forward:
        if replace or want != "held" or grad:
            return self._backend.run(tokens, read=read, replace=replace, want=want, grad=grad)
        return Forward(self._shared.take(self, tokens, read))
