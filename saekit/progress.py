"""What a person sees while something long runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressDisplay"]


class ProgressDisplay:
    """Shows how much of ``total`` is done, the rate, whatever else is worth seeing, and the time left.

    A context manager.  Where nobody knows the ``total``, it is None.  ``verbose`` off shows nothing.
    """

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(
        self,
        total: int | None,
        *,
        doing: str,
        unit: str = "tokens",
        verbose: bool = True,
        console: Console | None = None,
    ) -> None:
        self._total, self._unit = total, unit
        self._console = console or Console(stderr=True, quiet=not verbose)
        self._bar: Progress | None = None
        self._start = self._last_line = 0.0
        if verbose and self._console.is_terminal:
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}  {task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(doing, total=total, rate="", text="")

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "", *, before: int = 0) -> None:
        """``done`` of the total, of which ``before`` were there at the start."""
        now = time.monotonic()
        rate = (done - before) / max(now - self._start, 1e-9)
        shown_rate = f"{rate:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=shown_rate, text=text)
        elif now - self._last_line >= self._SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            if self._total is None:
                self.say(f"{done:,} {self._unit}  {shown_rate}  {text}")
            else:
                left = (self._total - done) / max(rate, 1e-9)
                self.say(f"{done:,}/{self._total:,} {self._unit}  {shown_rate}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)
