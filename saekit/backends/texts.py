"""Texts as tokens, and tokens as the texts that they stand for within a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saekit.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.protocols import ModelBackend

__all__ = ["text_ids", "texts_of", "to_tokens"]

_BEFORE = ("a", "the", "0", ".")
"""Texts whose last token may stand before others: any will do whose own text stays as it is."""


def to_tokens(backend: ModelBackend, texts: Sequence[str], prepend_bos: bool) -> Tensor:
    """See :meth:`saekit.backends.Backend.to_tokens`."""
    import torch

    bos = backend.special_tokens.get("bos")
    if prepend_bos and bos is None:
        raise ModelError(f"the tokenizer of {backend.name!r} has no BOS token; to_tokens(text, prepend_bos=False)")
    before = [bos] if prepend_bos else []
    rows = [[*before, *backend.tokenize(text)] for text in texts]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        found = f"found {lengths[0]} to {lengths[-1]}; take one at a time" if lengths else "found no text"
        raise ModelError(f"to_tokens: texts must come to equally many tokens, {found}")
    if not lengths[0]:
        raise ModelError("to_tokens: the text has no tokens")
    return torch.tensor(rows)


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
