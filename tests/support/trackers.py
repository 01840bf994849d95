"""Trackers that remember what they are given, and misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOON = 30.0  # seconds: only a failing test waits that long


class Recorder:
    """A tracker that remembers its calls, with hooks to misbehave."""

    def __init__(
        self, on_log: Callable[[int], object] | None = None, on_close: Callable[[], object] | None = None
    ) -> None:
        self.calls: list[tuple[Any, int]] = []
        self.threads: set[int] = set()
        self.closed = threading.Event()
        self._on_log, self._on_close = on_log, on_close

    def log(self, metrics: Any, step: int) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append((metrics, step))
        if self._on_log:
            self._on_log(step)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed.set()
        if self._on_close:
            self._on_close()

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self.calls]


class Uploader(Recorder):
    """One that is told of checkpoints too."""

    def log_checkpoint(self, folder: Path, step: int) -> None:
        self.log(folder, step)


def raises(error: BaseException) -> Callable[..., None]:
    def hook(*_: object) -> None:
        raise error

    return hook


def waits(gate: threading.Event, begun: threading.Event | None = None) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if begun is not None:
            begun.set()
        gate.wait(SOON)

    return hook
