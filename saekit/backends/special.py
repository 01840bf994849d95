"""The special tokens of a tokenizer."""

from __future__ import annotations

from typing import Any

__all__ = ["special_tokens"]


def special_tokens(tokenizer: Any) -> dict[str, int | None]:
    """The ids of ``bos``, ``eos`` and ``sep`` of a Hugging Face tokenizer, None for those that it lacks.

    A name that is no token of the vocabulary has the id of the unknown token in that library: it is lacking, too.
    """
    found: dict[str, int | None] = {}
    for kind in ("bos", "eos", "sep"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        name, unknown = getattr(tokenizer, f"{kind}_token", None), getattr(tokenizer, "unk_token", None)
        is_unknown = token is not None and token == getattr(tokenizer, "unk_token_id", None)
        found[kind] = None if is_unknown and str(name) != str(unknown) else token
    return found
