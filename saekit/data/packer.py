"""How documents become contexts of one length: the tokens that are put in, and what waits for the next document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from saekit.config import DatasetConfig
from saekit.data.faults import check_counts
from saekit.errors import DataError

__all__ = ["ContextPacker", "IntArray", "Packed", "TokenPolicy"]

IntArray = npt.NDArray[np.int64]
Packed = tuple[npt.NDArray[Any], ...]
"""A context: its tokens, their documents and, where there is a mask, which of them count, ``[context_size]`` each."""


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
    one_document: bool = False
    """Whether each context is of one document, the first of its tokens; one that is too short for that is left out."""

    @classmethod
    def of(cls, config: DatasetConfig, special_tokens: Mapping[str, int | None]) -> TokenPolicy:
        """The policy of ``config``, whose token options are all set, with a tokenizer's ids.

        :class:`DataError` names every option that asks for a token that the tokenizer lacks, one a line.
        """
        if config.context_size is None:
            raise ValueError("dataset.context_size is not set; saekit.data.Corpus sets it")
        problems: list[str] = []

        def resolve(option: str, token: str | int | None) -> int | None:
            if token is None or token == "none" or isinstance(token, int):
                return token if isinstance(token, int) else None
            if (known := special_tokens.get(token)) is None:
                problems.append(_lacking(option, token, special_tokens))
            return known

        begin = ("prepend_bos", "bos") if config.prepend_bos else ("begin_batch_token", config.begin_batch_token)
        policy = cls(
            context_size=config.context_size,
            begin_batch=resolve(*begin),
            begin_sequence=resolve("begin_sequence_token", config.begin_sequence_token),
            separator=resolve("sequence_separator_token", config.sequence_separator_token),
            one_document=bool(config.disable_concat_sequences),
        )
        if problems:
            raise DataError("\n".join(problems))
        return policy

    def token_ids(self) -> dict[str, int | None]:
        """The tokens alone."""
        return {"begin_batch": self.begin_batch, "begin_sequence": self.begin_sequence, "separator": self.separator}


def _lacking(option: str, token: str, special_tokens: Mapping[str, int | None]) -> str:
    has = {name: known for name, known in special_tokens.items() if known is not None}
    instead = "set it to false" if option == "prepend_bos" else 'give an id, or "none"'
    return (
        f"dataset.{option} asks for the tokenizer's {token} token, and it has none. It has {has or 'none at all'}; "
        f"{instead}"
    )


class ContextPacker:
    """Documents in, contexts of exactly ``context_size`` tokens out.

    A token is put in before another one only if they differ, so BOS is not doubled where a document, a separator
    and a context begin together.  What does not fill a context waits for the next document.
    """

    def __init__(self, policy: TokenPolicy, *, masked: bool = False) -> None:
        self.policy, self.masked = policy, masked
        self._tokens = np.empty(policy.context_size, dtype=np.int64)  # the context being filled, and its documents
        self._documents = np.empty(policy.context_size, dtype=np.int64)
        self._counts = np.empty(policy.context_size, dtype=np.bool_)
        self._filled = 0
        self._any_document = False
        self.left_out = self.cut = 0
        """Documents that were too short for a context of their own, and longer than one, where contexts are of one."""

    def add(
        self, document: Sequence[int] | IntArray, number: int = 0, counts: npt.NDArray[np.bool_] | None = None
    ) -> list[Packed]:
        """The contexts that a whole document completes.

        ``number`` is the document's, and ``counts`` its mask; an empty document is none.
        """
        return self.extend(document, number, begins=True, counts=counts)

    def extend(
        self,
        piece: Sequence[int] | IntArray,
        number: int = 0,
        *,
        begins: bool = False,
        joins: bool = False,
        counts: npt.NDArray[np.bool_] | None = None,
    ) -> list[Packed]:
        """As :meth:`add` for a piece of a document, of which only the first ``begins`` it.

        Documents may come in any pieces that are not empty: the contexts are the same.  Where a context is of one
        document, they come whole.  One ``joins`` that goes on with a document whose beginning is elsewhere.
        """
        tokens = np.asarray(piece, dtype=np.int64)
        counts = np.ones(len(tokens), dtype=np.bool_) if counts is None else counts
        if not len(tokens):
            return []
        if begins or joins:
            between = self._any_document and not self.policy.one_document
            put_in = self.policy.begin_sequence if begins else None, self.policy.separator if between else None
            for token in put_in:
                if token is not None and tokens[0] != token:
                    tokens, counts = np.concatenate([[token], tokens]), np.concatenate([[False], counts])
            self._any_document = True
        if self.policy.one_document:
            return self._only(tokens, counts, number)
        done = []
        while len(tokens):
            if not self._filled and self.policy.begin_batch is not None and tokens[0] != self.policy.begin_batch:
                self._put(self.policy.begin_batch, False, number)
            room = self.policy.context_size - self._filled
            self._put(tokens[:room], counts[:room], number)
            tokens, counts = tokens[room:], counts[room:]
            if self._filled == self.policy.context_size:
                done.append(self._taken())
        return done

    def _only(self, tokens: IntArray, counts: npt.NDArray[np.bool_], number: int) -> list[Packed]:
        """The one context of a document, if it is long enough."""
        size, begin = self.policy.context_size, self.policy.begin_batch
        if begin is not None and tokens[0] != begin:
            self._put(begin, False, number)
        room = size - self._filled
        if len(tokens) < room:
            self._filled = 0
            self.left_out += 1
            return []
        self.cut += len(tokens) > room
        self._put(tokens[:room], counts[:room], number)
        return [self._taken()]

    def _taken(self) -> Packed:
        self._filled = 0
        mask = [self._counts.copy()] if self.masked else []
        return (self._tokens.copy(), self._documents.copy(), *mask)

    def _put(self, tokens: int | IntArray, counts: bool | npt.NDArray[np.bool_], number: int) -> None:
        end = self._filled + (1 if isinstance(tokens, int) else len(tokens))
        self._tokens[self._filled : end] = tokens
        self._documents[self._filled : end] = number
        self._counts[self._filled : end] = counts
        self._filled = end

    def take_over(self, state: Mapping[str, Any]) -> list[Packed]:
        """The contexts that are completed by what waits in another packer, whose ``state`` this is."""
        other = ContextPacker(self.policy, masked=self.masked)
        other.load_state_dict(state)
        self.left_out, self.cut = self.left_out + other.left_out, self.cut + other.cut
        numbers = other._documents[: other._filled]
        if not len(numbers):
            return []
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), other._filled]
        done = []
        for start, end in pairwise(starts):
            counts = other._counts[start:end] if self.masked else None
            done += self.extend(other._tokens[start:end], int(numbers[start]), joins=start == 0, counts=counts)
        return done

    def state_dict(self) -> dict[str, Any]:
        """What waits for the next document."""
        return {
            "tokens": self._tokens[: self._filled].tolist(),
            "documents": self._documents[: self._filled].tolist(),
            "any_document": self._any_document,
            **({"counts": self._counts[: self._filled].tolist()} if self.masked else {}),
            **({"left_out": self.left_out, "cut": self.cut} if self.policy.one_document else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        filled = np.array([state["tokens"], state["documents"]]).reshape(2, -1)
        if filled.shape[1] >= self.policy.context_size or (filled.size and filled.dtype.kind != "i"):
            raise ValueError(f"the tokens that wait in a saved state are {state['tokens']!r:.80}")
        self._filled = filled.shape[1]
        self._tokens[: self._filled], self._documents[: self._filled] = filled
        if self.masked:
            self._counts[: self._filled] = _mask(state["counts"], self._filled)
        self._any_document = bool(state["any_document"])
        if self.policy.one_document:
            check_counts(state, "left_out", "cut")
            self.left_out, self.cut = state["left_out"], state["cut"]


def _mask(saved: Any, length: int) -> npt.NDArray[np.bool_]:
    if not isinstance(saved, list) or len(saved) != length or not all(isinstance(one, bool) for one in saved):
        raise ValueError(f"which tokens count is {saved!r:.80} in a saved state, expected {length} times true or false")
    return np.array(saved, dtype=np.bool_)
