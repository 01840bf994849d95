"""File operations that fail when a test wants it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
_watch: dict[str, Any] = {"left": 0, "folder": ""}


def _fail_in_time(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch["left"] and event in OPERATIONS and _watch["folder"] in str(arguments[0]):
        _watch["left"] -= 1
        if not _watch["left"]:
            raise _watch["error"]()


sys.addaudithook(_fail_in_time)  # for as long as the process lives; it does nothing but here


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def failing_at(operation: int, folder: Path, error: Callable[[], BaseException] = full_disk) -> Iterator[None]:
    """The file operation of this number in ``folder`` fails."""
    _watch.update(left=operation, folder=str(folder), error=error)
    try:
        yield
    finally:
        _watch["left"] = 0
