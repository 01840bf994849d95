"""Which tokenizer token ids belong to, told by what it does, not by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import attrs

from saekit.abilities import HasTokenizer
from saekit.errors import SaekitError
from saekit.garbage import uncollected
from saekit.protocols import ModelBackend

__all__ = ["Vocabulary", "tokenizer_here"]

_PROBE = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14159 o'clock, isn't it?\n\n"
    'def f(x, *args):\n    return {"a": x[0] ** 2}  # 100%\n\tTABS\t and   spaces \r\n'
    "Straße, naïve, œuvre, Ελληνικά, русский, עברית, 日本語, 한국어, ١٢٣, 🙂👍🏽, e\u0301, ½ × ² → ∞ «…»\u00a0\u200b!\n"
    "antidisestablishmentarianism HTTPServerError snake_case_name 0x1F 1,000,000 user@example.com https://a.b/c?d=e"
)
"""Words, digits, code, white space and many scripts: tokenizers that read this alike are alike."""


@attrs.frozen
class Vocabulary:
    """What tells one tokenizer from another; None is not known."""

    tokens: str | None = None
    """A hash of the vocabulary's tokens with their ids, without those that were added later."""
    added: Mapping[str, int] | None = None
    """Special tokens and others that were added: token to id."""
    probe: str | None = None
    """A hash of a probe text's ids."""

    @classmethod
    def of(cls, tokenizer: Any, tokenize: Callable[[str], Sequence[int]]) -> Vocabulary:
        """That of a tokenizer by ``tokenize``, and by the Hugging Face ``tokenizer`` where there is one (else None)."""
        try:
            probe: str | None = _hash([int(token) for token in tokenize(_PROBE)])
        except SaekitError:  # a model of token ids, without a tokenizer
            probe = None
        ids: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        if not ids:
            return cls(probe=probe)
        added = set(map(str, getattr(tokenizer, "added_tokens_decoder", {}).values()))
        base = sorted((token, index) for token, index in ids.items() if token not in added)
        return cls(_hash(base), {token: ids[token] for token in sorted(added & set(ids))}, probe)

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """That of a Hugging Face ``tokenizer``."""
        return cls.of(tokenizer, lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @classmethod
    def of_backend(cls, backend: ModelBackend) -> Vocabulary:
        """That of a model, which is known best by a Hugging Face tokenizer."""
        return cls.of(backend.tokenizer if isinstance(backend, HasTokenizer) else None, backend.tokenize)

    @classmethod
    def of_metadata(cls, made: Mapping[str, Any]) -> Vocabulary:
        """What :meth:`metadata` has written; :class:`TypeError` for what it cannot have."""
        tokens, added, probe = (made.get(name) for name in ("vocabulary", "added_tokens", "probe"))
        for name, value in (("vocabulary", tokens), ("probe", probe)):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} is {value!r}, expected a hash")
        if added is not None and not (isinstance(added, Mapping) and all(type(n) is int for n in added.values())):
            raise TypeError(f"added_tokens is {added!r:.80}, expected a table of token ids")
        return cls(tokens, added, probe)

    def metadata(self) -> dict[str, Any]:
        """Plain data (JSON's)."""
        return {"vocabulary": self.tokens, "added_tokens": self.added, "probe": self.probe}

    @property
    def known(self) -> bool:
        """Whether anything is."""
        return self.tokens is not None or self.probe is not None

    def differs_from(self, other: Vocabulary) -> str | None:
        """In what; None if nothing that is known of both differs."""
        if None not in (self.tokens, other.tokens) and self.tokens != other.tokens:
            return "the tokens of their vocabularies are not the same"
        if clash := _clash(self.added or {}, other.added or {}):
            return f"the special token {clash} has another id, or its id another token"
        if None not in (self.probe, other.probe) and self.probe != other.probe:
            return "the same text has other token ids"
        return None

    def tells(self, other: Vocabulary) -> bool:
        """Whether enough is known of both for them to be compared."""
        return None not in (self.probe, other.probe) or None not in (self.tokens, other.tokens)


def tokenizer_here(name: str) -> Vocabulary | None:
    """That of the Hugging Face tokenizer of that name, if it is on this machine; the Hub is not asked."""
    with uncollected():
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return Vocabulary.of_tokenizer(tokenizer)
    except Exception:  # the library raises whatever the files of a tokenizer, or none, make it stumble on
        return None


def _clash(one: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    """A token that both know, with different ids, or an id of both that stands for different tokens."""
    by_id = {index: token for token, index in other.items()}
    for token, index in one.items():
        if other.get(token, index) != index or by_id.get(index, token) != token:
            return repr(token)
    return None


def _hash(value: Any) -> str:
    plain = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
    return blake2b(plain, digest_size=16).hexdigest()
