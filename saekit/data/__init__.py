"""tokens → contexts → activations → batches, one module per stage, in that order."""

from __future__ import annotations

from saekit._lazy import lazy_exports

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
