"""tokens → contexts → activations → batches, one module per stage, in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.data.buffer import ShuffleBuffer
    from saekit.data.contexts import ContextPacker, ContextStream, TokenPolicy
    from saekit.data.stream import StreamContext
    from saekit.data.text import Documents

__all__ = ["ContextPacker", "ContextStream", "Documents", "ShuffleBuffer", "StreamContext", "TokenPolicy"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Documents": "saekit.data.text",
        "TokenPolicy": "saekit.data.contexts",
        "ContextPacker": "saekit.data.contexts",
        "ContextStream": "saekit.data.contexts",
        "ShuffleBuffer": "saekit.data.buffer",
        "StreamContext": "saekit.data.stream",
    },
)
