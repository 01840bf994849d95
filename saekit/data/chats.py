"""Conversations as token ids, by a tokenizer's chat template or by one that is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from saekit.data.documents import Conversation
from saekit.errors import ConfigError, DataError
from saekit.reasons import reason

__all__ = ["DocumentIds", "Tokenize", "chat_tokenizer"]

Tokenize = Callable[[str | Conversation], Sequence[int]]
"""A text or a conversation as token ids, nothing put before it."""


@attrs.frozen(eq=False)
class DocumentIds:
    """Token ids of documents."""

    texts: Callable[[str], Sequence[int]]
    chats: Callable[[Conversation], Sequence[int]] | None = None
    elsewhere: bool = False
    """Whether this can be sent to other processes, and makes the same ids there."""

    def __call__(self, document: str | Conversation) -> Sequence[int]:
        if isinstance(document, str):
            return self.texts(document)
        assert self.chats is not None  # none are read without a template
        return self.chats(document)


@attrs.frozen(eq=False)
class _ChatIds:
    tokenizer: Any
    template: str | None
    """None: the tokenizer's."""

    def __call__(self, conversation: Conversation) -> Sequence[int]:
        try:
            found: Sequence[int] = self.tokenizer.apply_chat_template(
                list(conversation.messages), chat_template=self.template, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template raises what it likes, and so does the library about one
            raise DataError(f"the chat template does not take it: {reason(error)}") from error
        return found


def chat_tokenizer(tokenizer: Any, template: bool | str, of: str) -> Callable[[Conversation], Sequence[int]]:
    """What makes token ids of conversations, by the template of ``tokenizer``, that of ``of``, or by the one that is
    given; :class:`ConfigError` where there is none.

    All that a template writes is kept, BOS included, which the packer does not double.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ConfigError(
            [("dataset.chat_template", f"needs a Hugging Face tokenizer, and {of} has none; leave it out, and make "
              "texts of the conversations")]
        )  # fmt: skip
    if template is True and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            [("dataset.chat_template", f"is true, and the tokenizer of {of} has no chat template; give one in its "
              "place, as a text, or use a model that was tuned for chats")]
        )  # fmt: skip
    return _ChatIds(tokenizer, None if isinstance(template, bool) else template)
