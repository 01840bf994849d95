"""How many tokens of a run count, and how many of its documents have a context, as far as its first contexts tell."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import attrs

from saekit.config import TrainConfig
from saekit.data.activations import check_contexts
from saekit.data.contexts import Contexts
from saekit.data.corpus import Corpus
from saekit.data.documents import Conversation, Masked
from saekit.data.packer import ContextPacker
from saekit.data.stream import StreamContext, kept_of
from saekit.errors import DataError
from saekit.protocols import ModelBackend
from saekit.tokens import TokenChoice

__all__ = [
    "Counted", "DocumentCounts", "Used", "counted", "counted_of", "documents_of",
]  # fmt: skip

FIRST = 64
"""Contexts that are looked at, at most."""
DOCUMENTS = 256
"""Documents, likewise."""


@attrs.frozen
class Counted:
    """Tokens that count."""

    used: int
    of: int
    contexts: int = 0
    """Contexts that were looked at; 0: it is so in each."""

    @property
    def share(self) -> float:
        """The part that counts."""
        return self.used / self.of

    def __str__(self) -> str:
        where = f"in the first {self.contexts:,} contexts" if self.contexts else "of each context"
        of = f"of {self.of:,} tokens" if self.contexts else f"of {self.of:,}"
        return f"{self.used:,} {of} {where} count"

    def metadata(self) -> dict[str, Any]:
        """As it is saved with an SAE."""
        return {"tokens_used": {"used": self.used, "of": self.of, "contexts": self.contexts or 1}}


def counted(choice: TokenChoice, contexts: Contexts) -> Counted:
    """How many tokens of ``contexts`` count; :class:`DataError` where there are none."""
    n, size = contexts.tokens.shape
    check_contexts(n, size)
    return Counted(int(kept_of(choice, contexts).sum()), n * size, n)


def counted_of(config: TrainConfig, corpus: Corpus, backend: ModelBackend, stream: StreamContext) -> Counted | None:
    """How many tokens of the training text count; None where all do.  Where ids or a mask say it, the first contexts
    are read."""
    if stream.counts_all:
        return None
    if not stream.choice.exclude and config.tokens.mask_column is None:
        return Counted(stream.rows_per_context(corpus.context_size), corpus.context_size)
    contexts = attrs.evolve(corpus, mask=config.tokens.mask_column).contexts(backend).take(FIRST)
    return counted(stream.choice, contexts)


@attrs.frozen
class DocumentCounts:
    """Documents where each context is of one."""

    read: int
    left_out: int
    cut: int

    def __str__(self) -> str:
        return (
            f"one in each context; of the first {self.read:,}, {self.left_out:,} are too short and left out, "
            f"{self.cut:,} are longer and cut"
        )

    def metadata(self) -> dict[str, Any]:
        """As it is saved with an SAE."""
        return {"documents_used": {"read": self.read, "left_out": self.left_out, "cut": self.cut}}


def documents_of(corpus: Corpus, backend: ModelBackend) -> DocumentCounts | None:
    """What becomes of the first documents of the training text; None where documents share contexts."""
    if corpus.packed is not None or not corpus.config.disable_concat_sequences:
        return None
    packer, ids = ContextPacker(corpus.policy(backend.special_tokens)), corpus.tokenize(backend)
    read = 0
    for number, document in itertools.islice(corpus.training_documents().read(), DOCUMENTS):
        if isinstance(document, Masked):
            tokens: Sequence[int] = document.tokens
        else:
            tokens = ids(document) if isinstance(document, (str, Conversation)) else document
        packer.add(tokens, number)
        read += len(tokens) > 0
    return DocumentCounts(read, packer.left_out, packer.cut)


@attrs.frozen
class Used:
    """What is used of a text."""

    tokens: Counted | None = None
    documents: DocumentCounts | None = None

    @classmethod
    def of(cls, config: TrainConfig, corpus: Corpus, backend: ModelBackend, stream: StreamContext) -> Used:
        """As far as the first contexts tell, and where they are there: a cache of activations needs no text."""
        if not stream.has_model:
            return cls()
        with contextlib.suppress(DataError), stream.model_lock:
            return cls(counted_of(config, corpus, backend, stream), documents_of(corpus, backend))
        return cls()

    @property
    def facts(self) -> dict[str, str]:
        """For people; empty where everything is used."""
        said = {"tokens": self.tokens, "documents": self.documents}
        return {name: str(one) for name, one in said.items() if one is not None}

    @property
    def numbers(self) -> dict[str, float]:
        """For programs."""
        return {} if self.tokens is None else {"tokens_used_share": self.tokens.share}

    @property
    def doubts(self) -> list[str]:
        """What looks wrong."""
        found = []
        if self.tokens is not None and not self.tokens.used:
            found.append(
                f"{self.tokens}: see tokens.exclude_special_tokens, tokens.seqpos_slice and tokens.mask_column"
            )
        if self.documents is not None and self.documents.left_out == self.documents.read:
            found.append(
                f"all of the first {self.documents.read:,} documents are too short for a context of their own "
                "(dataset.disable_concat_sequences), so they are left out. Lower dataset.context_size"
            )
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """As it is saved with an SAE, and with a run."""
        there = [one for one in (self.tokens, self.documents) if one is not None]
        return {name: value for one in there for name, value in one.metadata().items()}
