"""No progress bars of transformers while saekit loads a model.  A helper of the backends' plugins, not a plugin."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["without_bars"]

_lock = threading.Lock()
_here = threading.local()
_loading = 0
_before: Any = None


@contextmanager
def without_bars() -> Iterator[None]:
    """While the context is open, transformers shows no bars of what this thread loads; those of downloads stay.

    The library's own switch is for the whole process: a hook of its bars is put there instead, and taken away again.
    """
    from transformers.utils import logging

    global _loading, _before
    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:  # of older versions, which show none for one file
        yield
        return
    with _lock:
        _loading += 1
        if _loading == 1:
            _before = set_hook(_made)
    was, _here.loads = getattr(_here, "loads", False), True
    try:
        yield
    finally:
        _here.loads = was
        with _lock:
            _loading -= 1
            if not _loading:
                set_hook(_before)
                _before = None


def _made(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(_here, "loads", False):
        return factory(*args, **{**kwargs, "disable": True})
    return factory(*args, **kwargs) if _before is None else _before(factory, args, kwargs)
