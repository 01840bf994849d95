"""What a process is at, for the others that wait for it, and since when it has done nothing at all.

Slow work cannot be told from work that never ends.  But one that hangs, in a lock or for an answer that does not come,
does nothing: the thread whose work it is uses no processor time, nor do other threads more than a little, and nothing
is read from a disk or written.  A slow disk takes a piece now and then.  Imports no torch.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

__all__ = ["MainThread"]

_BUSY = 0.05
"""Of the time that goes by, what threads may use that only look now and then whether there is something to do."""
_BYTES = 1 << 20
"""What logs may write meanwhile."""


class MainThread:
    """Of this process, the ``thread`` whose work the others wait for."""

    def __init__(self, thread: threading.Thread | None = None) -> None:
        """None: the one that asks."""
        self._thread = thread or threading.current_thread()
        self._begin()

    def _begin(self) -> None:
        self._since, self._used = time.monotonic(), self._processor()
        self._all_used, self._bytes = time.process_time(), _moved()

    def _processor(self) -> object:
        """What changes whenever the thread does something: its processor time, or its place where that is not told."""
        if not self._thread.is_alive() or self._thread.ident is None:
            return None
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))
        except (AttributeError, OSError):
            return [(frame.f_code.co_name, frame.f_lasti) for frame in self._frames()]

    def idle(self, *, waits: bool = False) -> float:
        """Seconds since it was last seen to do something, or since it, or a thread of its, ``waits`` for others."""
        seconds = time.monotonic() - self._since
        busy = time.process_time() - self._all_used > _BUSY * max(seconds, 1)
        if waits or busy or self._processor() != self._used or _moved() - self._bytes >= _BYTES:
            self._begin()
            return 0.0
        return seconds

    def where(self) -> str:
        """Where it is, in words: the innermost call, and which of saekit's made it; empty where that is not known."""
        frames = self._frames()
        ours = next((number for number, frame in enumerate(frames) if _is_ours(frame)), len(frames) - 1)
        shown = sorted({0, max(ours - 1, 0), ours} if frames else ())
        return ", in ".join(
            f"{_module(frames[n])}.{frames[n].f_code.co_name} (line {frames[n].f_lineno})" for n in shown
        )

    def _frames(self) -> list[FrameType]:
        """The innermost first."""
        frame, found = sys._current_frames().get(self._thread.ident or 0), list[FrameType]()
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _is_ours(frame: FrameType) -> bool:
    return _module(frame).startswith("saekit.") and not _module(frame).startswith("saekit.distributed.")


def _moved() -> int:
    """Bytes that this process has read from disks and written to them; 0 where that is not told."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes", "write_bytes")))
