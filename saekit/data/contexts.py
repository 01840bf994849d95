"""Stage two: documents packed into contexts of one length; nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from saekit.config import DatasetConfig
from saekit.errors import DataError

__all__ = ["ContextPacker", "ContextStream", "TokenPolicy"]

IntArray = npt.NDArray[np.int64]


@attrs.frozen(kw_only=True)
class TokenPolicy:
    """Which tokens are put in, as ids; None puts in nothing."""

    context_size: int
    begin_batch: int | None = None
    """Begins every context."""
    begin_sequence: int | None = None
    """Begins every document."""
    separator: int | None = None
    """Between two documents."""

    @classmethod
    def of(cls, config: DatasetConfig, special_tokens: Mapping[str, int | None]) -> TokenPolicy:
        """The policy of ``config`` with a tokenizer's ids; a token that the tokenizer lacks is a :class:`DataError`."""

        def resolve(option: str, token: str | int) -> int | None:
            if token == "none" or isinstance(token, int):
                return token if isinstance(token, int) else None
            if (found := special_tokens.get(token)) is None:
                raise DataError(
                    f"dataset.{option} asks for the tokenizer's {token} token, and it has none. It has "
                    f"{ {name: token for name, token in special_tokens.items() if token is not None} }; "
                    f'give an id, or "none"'
                )
            return found

        begin = resolve("prepend_bos", "bos") if config.prepend_bos else None
        return cls(
            context_size=config.context_size,
            begin_batch=begin if config.prepend_bos else resolve("begin_batch_token", config.begin_batch_token),
            begin_sequence=resolve("begin_sequence_token", config.begin_sequence_token),
            separator=resolve("sequence_separator_token", config.sequence_separator_token),
        )


class ContextPacker:
    """Documents in, contexts of exactly ``context_size`` tokens out.

    A token is put in before another one only if they differ, so BOS is not doubled where a document, a separator
    and a context begin together.  What does not fill a context waits for the next document.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self._open: list[IntArray] = []  # the pieces of the context being filled
        self._filled = 0
        self._any_document = False

    def add(self, document: Sequence[int] | IntArray) -> list[IntArray]:
        """The contexts, ``[context_size]`` each, that ``document`` completes; an empty document is none."""
        tokens = np.asarray(document, dtype=np.int64)
        if not len(tokens):
            return []
        for token in (self.policy.begin_sequence, self.policy.separator if self._any_document else None):
            if token is not None and tokens[0] != token:
                tokens = np.concatenate([[token], tokens])
        self._any_document = True
        done = []
        while len(tokens):
            if not self._filled and self.policy.begin_batch is not None and tokens[0] != self.policy.begin_batch:
                self._put(np.array([self.policy.begin_batch]))
            room = self.policy.context_size - self._filled
            self._put(tokens[:room])
            tokens = tokens[room:]
            if self._filled == self.policy.context_size:
                done.append(np.concatenate(self._open))
                self._open, self._filled = [], 0
        return done

    def _put(self, piece: IntArray) -> None:
        self._open.append(piece)
        self._filled += len(piece)

    def state_dict(self) -> dict[str, Any]:
        """What waits for the next document."""
        return {"open": [int(token) for piece in self._open for token in piece], "any_document": self._any_document}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._open = [np.asarray(state["open"], dtype=np.int64)] if state["open"] else []
        self._filled = len(state["open"])
        self._any_document = state["any_document"]


class _End:
    """No document can be mistaken for it."""


_END = _End()


class ContextStream:
    """Contexts from documents; ``take(n)`` gives the next ``n``, fewer only when the data has ended.

    ``documents`` gives texts or token ids and can be read again, which ``repeat`` does for ever; ``tokenize`` turns a
    text into ids.
    """

    def __init__(
        self,
        documents: Iterable[str | Sequence[int]],
        tokenize: Callable[[str], Sequence[int]],
        policy: TokenPolicy,
        *,
        d_vocab: int,
        repeat: bool,
    ) -> None:
        self.policy = policy
        self._documents = documents
        self._tokenize = tokenize
        self._d_vocab = d_vocab
        self._repeat = repeat
        self._packer = ContextPacker(policy)
        self._ready: list[IntArray] = []
        self._position = 0  # documents of this epoch that went into the packer
        self._epoch = 0
        self.contexts_served = 0
        self._iterator: Iterator[str | Sequence[int]] | None = None

    def take(self, n: int) -> IntArray:
        """``[m, context_size]`` token ids, ``m = n`` unless the data ended."""
        while len(self._ready) < n and self._read_document():
            pass
        rows, self._ready = self._ready[:n], self._ready[n:]
        self.contexts_served += len(rows)
        return np.stack(rows) if rows else np.empty((0, self.policy.context_size), dtype=np.int64)

    def _read_document(self) -> bool:
        if self._iterator is None:
            self._iterator = iter(self._documents)
            for _ in range(self._position):
                next(self._iterator)
        document = next(self._iterator, _END)
        if isinstance(document, _End):
            return self._exhausted()
        self._ready += self._packer.add(self._checked(document))
        self._position += 1
        return True

    def _exhausted(self) -> bool:
        if not self._repeat:
            return False
        if not self._position:
            raise DataError("the dataset has no documents to train on; see evals.held_out_every and evals.split")
        self._iterator, self._position, self._epoch = None, 0, self._epoch + 1
        if not (self.contexts_served or self._ready) and self._epoch > self.policy.context_size:
            raise DataError("the dataset's documents hold no tokens")
        return True

    def _checked(self, document: str | Sequence[int]) -> IntArray:
        ids = self._tokenize(document) if isinstance(document, str) else document
        tokens = np.asarray(ids, dtype=np.int64)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._d_vocab):
            bad = int(tokens.max()) if tokens.max() >= self._d_vocab else int(tokens.min())
            raise DataError(
                f"document {self._position} holds the token id {bad}, but the model's vocabulary ends at "
                f"{self._d_vocab - 1}: the data was tokenised for another model"
            )
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """The position in the documents, and the contexts and tokens that wait."""
        return {
            "position": self._position,
            "epoch": self._epoch,
            "contexts_served": self.contexts_served,
            "ready": [row.tolist() for row in self._ready],
            "packer": self._packer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the very next context."""
        self._position, self._epoch = state["position"], state["epoch"]
        self.contexts_served = state["contexts_served"]
        self._ready = [np.asarray(row, dtype=np.int64) for row in state["ready"]]
        self._packer.load_state_dict(state["packer"])
        self._iterator = None
