"""Warnings as the command line shows them: a line each, and of several processes each thing once."""

from __future__ import annotations

import os
import threading

from saekit.commands.terminal.ending import complain

__all__ = ["Warned"]

_FIRST_WARNS = 2.0
"""Seconds in which the first process warns of what another has seen, too."""


class Warned:
    """What the first process warns of is shown at once; what another does, a moment later, if nobody else has."""

    def __init__(self) -> None:
        rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
        self._rank = int(rank) if rank.isdecimal() else 0
        self._alone = "WORLD_SIZE" not in os.environ
        self._kept: list[str] = []
        self._lock = threading.Lock()

    def show(self, text: str) -> None:
        """Show it, or keep it for a moment."""
        if self._alone:
            complain(f"warning: {text}")
            return
        from saekit.distributed.telling import first_to_warn

        if not self._rank:
            if first_to_warn(text):
                complain(f"warning: {text}")
            return
        with self._lock:
            self._kept.append(text)
        self._look_later()

    def _look_later(self) -> None:
        timer = threading.Timer(_FIRST_WARNS, self._look)
        timer.daemon = True
        timer.start()

    def _look(self) -> None:
        from saekit.distributed.telling import have_met

        self.show_kept() if have_met() else self._look_later()

    def show_kept(self) -> None:
        """Show now what was kept, and nobody else has shown."""
        with self._lock:
            kept, self._kept = self._kept, []
        if kept:
            from saekit.distributed.telling import first_to_warn

            for text in kept:
                if first_to_warn(text):
                    complain(f"warning: of process {self._rank}: {text}")
