"""What a person sees while something long runs: a bar in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from saekit.status import Beat, InPlace, Lines, Status

__all__ = ["Counted", "ProgressDisplay"]

_SECONDS_BETWEEN_PICTURES = 0.5  # of a notebook's, each of which goes through a socket


class ProgressDisplay:
    """Shows how much of ``total`` is done, the rate, whatever else is worth seeing, and the time left.

    A context manager.  Where nobody knows the ``total``, it is None.  ``verbose`` off shows nothing.
    """

    def __init__(
        self,
        total: int | None,
        *,
        doing: str,
        unit: str = "tokens",
        verbose: bool = True,
        console: Console | None = None,
        steady: bool = False,
    ) -> None:
        """``steady`` shows a line when it is time for one, and not when something happens; a thread does that."""
        self.total, self._unit, self._doing = total, unit, doing
        self._console = console or Console(stderr=True, quiet=not verbose)
        self._bar: Progress | None = None
        self._picture: InPlace | None = None
        self._lines, self._steady = Lines(self._console), steady and verbose
        self._beat: Beat | None = None
        self._status = Status(verbose=verbose, console=self._console)
        self._start = self._last_picture = 0.0
        if verbose and self._console.is_jupyter:
            self._picture = InPlace()
        elif verbose and self._console.is_terminal:
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
        self._start = time.monotonic()
        self._lines.begin()
        if self._bar is not None:
            self._bar.start()
        elif self._picture is None and self._steady:
            self._beat = Beat(self._lines.show_due)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.rest()
        if self._beat is not None:
            self._beat.stop()
        if self._bar is not None:
            self._bar.stop()
        elif self._picture is not None:
            self._picture.finish()
        else:
            self._lines.finish()

    def update(self, done: int, text: str = "", *, before: int = 0) -> None:
        """``done`` of the total, of which ``before`` were there at the start."""
        now = time.monotonic()
        rate = (done - before) / max(now - self._start, 1e-9)
        shown_rate = _rate_text(rate, self._unit)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, rate=shown_rate, text=text)
            return
        self._status.rest()
        parts = [f"{done:,}{'' if self.total is None else f'/{self.total:,}'} {self._unit}", shown_rate, text]
        if self.total is not None and rate > 0:
            parts.append(f"{(self.total - done) / rate:,.0f} s left")
        line = "  ".join(part for part in parts if part)
        if self._picture is None:
            self._lines.offer(line)
        else:
            at_once = now - self._last_picture >= _SECONDS_BETWEEN_PICTURES
            self._picture.show(f"{self._doing}  {line}", part=done / self.total if self.total else None, draw=at_once)
            self._last_picture = now if at_once else self._last_picture

    def doing(self, text: str) -> None:
        """Until the next update, something else is done."""
        if self._bar is not None:
            self._bar.update(self._task, text=f"{text} ...")
        elif self._picture is not None:
            self._picture.show(f"{self._doing}  {text} ...")
        else:
            self._status(text)

    def begins(self, text: str) -> None:
        """A line that says so, where there is no bar."""
        if self._bar is None and self._picture is None:
            self._lines.say(f"{text} ...")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._lines.say(text)


class Counted:
    """A bar of ``total`` things, which is told how many more are done; when the work is, it is full.

    A context manager that gives that function.  Where there is no bar, a line says what begins.
    """

    def __init__(self, total: int, doing: str, unit: str, *, verbose: bool = True) -> None:
        self._display = ProgressDisplay(total, doing=doing, unit=unit, verbose=verbose)
        self._total, self._done, self._doing = total, 0, doing

    def __enter__(self) -> Callable[[int], None]:
        self._display.__enter__()
        self._display.begins(self._doing)
        return self.add

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._done < self._total:
            self._display.update(self._total)
        self._display.__exit__(kind, error, trace)

    def add(self, count: int) -> None:
        """So many more."""
        self._done = min(self._done + count, self._total)
        self._display.update(self._done)


def _rate_text(rate: float, unit: str) -> str:
    """How fast it goes; of what takes long, how long each takes, and nothing where none is done."""
    if rate <= 0:
        return ""
    if rate < 0.1:
        return f"{1 / rate:,.0f} s each"
    return f"{rate:,.0f} {unit}/s" if rate >= 9.95 else f"{rate:.1f} {unit}/s"


class _BarAboveText(Progress):
    """The bar in one line, and below it what is worth seeing, which would leave it no room."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(f"  {task.fields['text']}")
