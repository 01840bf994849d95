"""What a person sees while something long runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

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
        self.total, self._unit = total, unit
        self._console = console or Console(stderr=True, quiet=not verbose)
        self._bar: Progress | None = None
        self._start = self._last_line = 0.0
        self._unsaid = ""  # the newest line, if it came too soon after another
        if verbose and self._console.is_terminal:
            self._bar = _BarAboveText(
                TextColumn(doing),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
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
        elif self._unsaid:
            self.say(self._unsaid)

    def update(self, done: int, text: str = "", *, before: int = 0) -> None:
        """``done`` of the total, of which ``before`` were there at the start."""
        now = time.monotonic()
        rate = (done - before) / max(now - self._start, 1e-9)
        shown_rate = f"{rate:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, rate=shown_rate, text=text)
            return
        if self.total is None:
            self._unsaid = f"{done:,} {self._unit}  {shown_rate}  {text}"
        else:
            left = (self.total - done) / max(rate, 1e-9)
            self._unsaid = f"{done:,}/{self.total:,} {self._unit}  {shown_rate}  {text}  {left:.0f} s left"
        if now - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self.say(self._unsaid)
            self._last_line, self._unsaid = now, ""

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, highlight=False, soft_wrap=True)


class _BarAboveText(Progress):
    """The bar in one line, and below it what is worth seeing, which would leave it no room."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(f"  {task.fields['text']}")
