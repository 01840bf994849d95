"""When Python looks for garbage in cycles, and when it would look in vain."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]

_lock = threading.Lock()
_inside = 0
_enabled = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, nobody looks for garbage in cycles: for imports of large libraries, and for drawing.

    They make hundreds of thousands of objects that stay, which Python goes through again each time that there are a
    quarter more: a quarter of the time of importing transformer_lens.  Not for what holds tensors in cycles.

    It counts for the whole process, until the last thread has left; whoever has turned collection off finds it off.
    """
    global _inside, _enabled
    with _lock:
        if not _inside:
            _enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _enabled:
                gc.enable()
