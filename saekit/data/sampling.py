"""A sample of a text: contexts from documents all over it, drawn by a seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import numpy as np

from saekit.data.contexts import Contexts, Piece
from saekit.data.corpus import Corpus, drawn

if TYPE_CHECKING:
    from saekit.protocols import ModelBackend

__all__ = ["Sample", "sampled", "stretch"]

_FIRST_POOL = 1024
"""Documents that are drawn from, where they can only be read one after the other; more where they are too few."""
_LARGER = 8
"""How many times as many, where these gave nothing."""
_HELD = 1 << 28
"""Characters of such documents that are held; for many contexts, so many of each of their tokens:"""
_PER_TOKEN = 64
_LEAST_DOCUMENTS = 16
_ENOUGH = 1024


@attrs.frozen(eq=False)
class Sample:
    """Contexts of a text."""

    contexts: Contexts
    first: int | None
    """They are drawn from so many documents, with which the text begins; None: from all of it."""


def stretch(n: int) -> int:
    """How many contexts are packed, of which ``n`` are drawn."""
    return max(n, min(8 * n, _ENOUGH))


def sampled(corpus: Corpus, backend: ModelBackend, n: int, seed: int) -> Sample:
    """``n`` contexts of what ``corpus`` trains on, or all that its text fills.

    Documents come in an order that ``seed`` draws, and a long one gives a piece that it draws, too: no more than a
    sixteenth of what is packed, as long as others fill the rest.
    """
    documents, packed = corpus.training_documents(), stretch(n)
    pool = documents.pool(max(_HELD, _PER_TOKEN * packed * corpus.context_size))
    most = _FIRST_POOL
    while True:
        chosen, read, whole = documents.shuffled(seed, most, pool)
        found = corpus.packed_from(backend, chosen, _piece(corpus, packed // _LEAST_DOCUMENTS, seed)).take(packed)
        if len(found) >= n or whole or (pool is not None and pool.full):
            break
        # As many as these say that it takes, and some, since all of them are tokenized anew.
        most = most * _LARGER if not len(found) else max(2 * most, math.ceil(1.25 * most * n / len(found)))
    if len(found) < n:
        found = corpus.packed_from(backend, chosen, _piece(corpus, packed, seed)).take(packed)
    return Sample(drawn(found, n, seed), None if whole or documents.size is not None else read)


def _piece(corpus: Corpus, contexts: int, seed: int) -> Piece | None:
    """Where the part begins and ends that is read of a document, by its number and its tokens."""
    if corpus.config.disable_concat_sequences:  # contexts begin where their documents do
        return None
    most = max(contexts, 1) * corpus.context_size

    def piece(number: int, length: int) -> tuple[int, int]:
        if length <= most:
            return 0, length
        start = int(np.random.default_rng([seed, number]).integers(length - most + 1))
        return start, start + most

    return piece
