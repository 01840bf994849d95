"""Texts as tokens, and tokens as the texts that they stand for within a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["text_ids", "texts_of"]

_BEFORE = ("a", "the", "0", ".")
"""Texts whose last token may stand before others: any will do whose own text stays as it is."""


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` by a Hugging Face tokenizer, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def texts_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Each of ``tokens`` as a Hugging Face ``tokenizer`` decodes it after another token.

    Alone, a token of a tokenizer like SentencePiece's loses the space that it begins with (``▁the``), since a text does
    not begin with one.  So joined, these are the decoded text, with such a space before its first token, and but for
    characters that are made of several tokens, each of which is ``�``.  Special tokens and others that were added are
    what they are called.
    """
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    before = next(filter(None, (_stands_before(tokenizer, text) for text in _BEFORE)), None)
    return [added[token] if token in added else _text(tokenizer, token, before) for token in tokens]


def _stands_before(tokenizer: Any, text: str) -> tuple[int, str] | None:
    """The last token of ``text``, and its text; None for one that none may follow."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids or ids[-1] == getattr(tokenizer, "unk_token_id", None):
        return None
    alone: str = tokenizer.decode([ids[-1]])
    return (ids[-1], alone) if alone and "\ufffd" not in alone and not alone.isspace() else None


def _text(tokenizer: Any, token: int, before: tuple[int, str] | None) -> str:
    if before is not None:
        both: str = tokenizer.decode([before[0], token])
        if both.startswith(before[1]):
            return both[len(before[1]) :]
    alone: str = tokenizer.decode([token])
    return alone
