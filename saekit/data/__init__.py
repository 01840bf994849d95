"""text → tokens → contexts → activations → batches, one module per stage, in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.data.activations import ActivationStream
    from saekit.data.buffer import ShuffleBuffer
    from saekit.data.contexts import ContextPacker, Contexts, ContextStream, TokenPolicy
    from saekit.data.corpus import Corpus
    from saekit.data.prefetch import Prefetched
    from saekit.data.stream import StreamContext
    from saekit.data.text import Documents

_HOMES = {
    "ActivationStream": "saekit.data.activations",
    "ContextPacker": "saekit.data.contexts",
    "ContextStream": "saekit.data.contexts",
    "Contexts": "saekit.data.contexts",
    "Corpus": "saekit.data.corpus",
    "Documents": "saekit.data.text",
    "Prefetched": "saekit.data.prefetch",
    "ShuffleBuffer": "saekit.data.buffer",
    "StreamContext": "saekit.data.stream",
    "TokenPolicy": "saekit.data.contexts",
}

__all__ = [
    "ActivationStream",
    "ContextPacker",
    "ContextStream",
    "Contexts",
    "Corpus",
    "Documents",
    "Prefetched",
    "ShuffleBuffer",
    "StreamContext",
    "TokenPolicy",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
