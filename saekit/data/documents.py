"""What a document may be beside a text and a list of token ids: a conversation, and ids of which some do not count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from saekit.errors import DataError

__all__ = ["CONVERSATIONS", "TEXTS", "Conversation", "Document", "Form", "Masked", "messages_of"]

TEXTS = ("tokens", "input_ids", "text")
"""The columns that are looked for, the first that is there."""
CONVERSATIONS = ("messages", "conversations")
"""Those of conversations."""


@attrs.frozen
class Conversation:
    """Messages, each a table with ``role`` and ``content``, and what else a template may ask for."""

    messages: Sequence[Mapping[str, Any]]


@attrs.frozen(eq=False)
class Masked:
    """Token ids, and which of them count."""

    tokens: Sequence[int]
    counts: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


Document: TypeAlias = str | Sequence[int] | Conversation | Masked


@attrs.frozen
class Form:
    """What the documents of a dataset are."""

    chat: bool = False
    """Conversations (``dataset.chat_template``)."""
    mask: str | None = None
    """The column that says which tokens count (``tokens.mask_column``)."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are looked for."""
        return CONVERSATIONS if self.chat else TEXTS

    def check_first(self, record: Mapping[str, Any], column: str, where: str) -> None:
        """:class:`DataError` where the first document is another thing than what the options say."""
        value = record[column]
        if self.chat and value is not None:
            if isinstance(value, str) or not messages_of(value):
                raise DataError(
                    f"column {column!r} of {where} holds {type(value).__name__}, and dataset.chat_template asks for "
                    "conversations: lists of messages with role and content"
                )
            conversation(value, 0, where)
        if self.mask is None:
            return
        if self.chat or isinstance(value, str):
            holds = "conversations" if self.chat else "texts"
            raise DataError(
                f"tokens.mask_column is {self.mask!r}, which says for each token whether it counts, and column "
                f"{column!r} of {where} holds {holds}. Tokenize the data, or choose tokens by id "
                "(tokens.exclude_special_tokens) or position (tokens.seqpos_slice)"
            )
        if self.mask not in record:
            raise DataError(
                f"{where} has no column {self.mask!r} (tokens.mask_column); it has {', '.join(map(repr, record))}"
            )

    def made(self, value: Any, record: Any, index: int, where: str) -> Any:
        """The document ``value`` of ``record``."""
        if self.chat:
            return conversation(value, index, where)
        return value if self.mask is None else masked(value, _mask_of(record, self.mask, index, where), index, where)


def conversation(value: Any, index: int, where: str) -> Conversation:
    """The messages of document ``index``; :class:`DataError` says which of them is none."""
    messages = messages_of(value)
    if messages is None:
        raise DataError(
            f"document {index} of {where} is {value!r:.80}, expected a conversation (dataset.chat_template): a list of "
            "messages with role and content"
        )
    for number, message in enumerate(messages):
        role, said = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            found = f"its fields are {', '.join(map(repr, message)) or 'none'}"
            raise DataError(f"message {number} of document {index} of {where} has no role; {found}")
        if said is None and not any(value for name, value in message.items() if name not in ("role", "content")):
            raise DataError(f"message {number} of document {index} of {where}, by {role!r}, has no content")
        if said is not None and not isinstance(said, (str, list, tuple)):
            raise DataError(
                f"the content of message {number} of document {index} of {where} is {said!r:.60}, expected a text"
            )
    return Conversation(messages)


def messages_of(value: Any) -> list[dict[str, Any]] | None:
    """Messages, without fields that are not there (of records of one file, each has those of all); None for what has
    none."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        return None
    if not all(isinstance(message, Mapping) for message in value):
        return None
    return [
        {name: item for name, item in message.items() if item is not None or name == "content"} for message in value
    ]


def _mask_of(record: Any, column: str, index: int, where: str) -> Any:
    try:
        return record[column]
    except (KeyError, TypeError) as error:
        raise DataError(f"document {index} of {where} has no column {column!r} (tokens.mask_column)") from error


def masked(tokens: Any, mask: Any, index: int, where: str) -> Masked:
    """Token ids with their mask; :class:`DataError` for one that is not a 0 or 1 for each of them."""
    if isinstance(tokens, str):
        raise DataError(f"document {index} of {where} is a text, which no mask fits (tokens.mask_column)")
    try:
        found = np.asarray(mask)
        fits = found.ndim == 1 and (
            found.dtype == np.bool_ or (found.dtype.kind in "iu" and bool(((found == 0) | (found == 1)).all()))
        )
    except ValueError:  # lists of several lengths
        fits = False
    if not fits and not (isinstance(mask, Sequence) and not len(mask)):
        raise DataError(
            f"the mask of document {index} of {where} is {mask!r:.80}, expected a 0 or 1 for each token "
            "(tokens.mask_column)"
        )
    if len(found) != len(tokens):
        raise DataError(
            f"the mask of document {index} of {where} has {len(found)} numbers, and it has {len(tokens)} tokens "
            "(tokens.mask_column)"
        )
    return Masked(tokens, found.astype(np.bool_))
