"""Ctrl-C and SIGTERM, kept until they do no harm."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interruption"]

_ECHOES = 5.0
"""Seconds in which a signal that comes again is the same one."""


class Interruption:
    """While this context lasts, the first SIGINT or SIGTERM is only noted; :meth:`raise_if_asked` raises it.

    A second one is raised where it comes, as every one is after :meth:`act_at_once`.  Outside the main thread, which
    alone gets signals, it does nothing.

    Of several ``processes``, whoever started them passes on what it gets, and a cluster may send it to each as well: a
    second one that comes so soon is the first.
    """

    def __init__(self, processes: int = 1) -> None:
        self._echoes_until = 0.0
        self._several = processes > 1
        self.signal = signal.SIGINT
        """What was received, if anything was."""
        self._asked = self._at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if kind is None:
            self.raise_if_asked()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._several and now < self._echoes_until:
            return
        self.signal, self._echoes_until = signal.Signals(number), now + _ECHOES
        if self._asked or self._at_once:
            raise KeyboardInterrupt
        self._asked = True

    @property
    def asked(self) -> int:
        """The number of the signal that has come and waits to take effect; 0: none has."""
        return int(self.signal) if self._asked else 0

    def hand_on(self, number: int) -> None:
        """A signal has come to another process of the run, which is as if it had come here."""
        self.signal, self._asked = signal.Signals(number), True
        self._echoes_until = time.monotonic() + _ECHOES

    def act_at_once(self) -> None:
        """From now on, keep no signal back; :class:`KeyboardInterrupt`, if one has come."""
        self._at_once = True
        self.raise_if_asked()

    def raise_if_asked(self) -> None:
        """:class:`KeyboardInterrupt`, if a signal has come."""
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt
