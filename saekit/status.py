"""What is being done now, for people: nothing that takes long is silent.

A spinner in a terminal, one place that changes in a notebook, and elsewhere lines, few enough for a file.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.status import Status as Spinner

__all__ = ["Beat", "InPlace", "Lines", "Say", "Status"]

Say: TypeAlias = Callable[[str], object]
"""Is told what is being done from now on, in words: ``loading the model gpt2``."""

_SECONDS_BETWEEN_LINES = 2.0  # at first; as time goes on, a fiftieth of it
_SECONDS_OF_WAITING = (2.0, 5.0, 10.0, 30.0)  # before a line that says that nothing is new, and before all others
_MOST_BETWEEN_LINES = 60.0


class Lines:
    """Lines that are not a flood: of those that are offered, one now and then is shown, and the last."""

    def __init__(self, console: Console, pauses: Sequence[float] = ()) -> None:
        """``pauses``: seconds before the first line, the second and so on, and before all after the last of them."""
        self._console, self._pauses, self._lock = console, list(pauses), threading.Lock()
        self._unsaid = self._said = ""  # the newest line, if it came too soon after another; and the last one shown
        self.begin()

    def begin(self) -> None:
        """The time runs from now."""
        self._start = self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for a line."""
        now = time.monotonic()
        pause = min(max((now - self._start) / 50, _SECONDS_BETWEEN_LINES), _MOST_BETWEEN_LINES)
        return now - self._last >= (self._pauses[0] if self._pauses else pause)

    def offer(self, text: str) -> None:
        """Show ``text`` if it is time for a line."""
        self._unsaid = text
        self.show_due()

    def show_due(self) -> None:
        """Show what was offered last, if it is time for a line."""
        if self.due:
            self.finish()

    def finish(self) -> None:
        """Show what was offered last, unless that is done."""
        with self._lock:
            if self._unsaid and self._unsaid != self._said:
                self.say(self._unsaid)
                self._last, self._said = time.monotonic(), self._unsaid
                if len(self._pauses) > 1:
                    del self._pauses[0]
            self._unsaid = ""

    def say(self, text: str) -> None:
        """A line at once, beside those that are offered."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class Status:
    """Called with what is done from now on, until it is called again, or rests.

    A context manager; at its end it rests.  ``verbose`` off shows nothing.
    """

    def __init__(self, *, verbose: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=not verbose)
        self._verbose = verbose and not self._console.quiet
        self._spinner: Spinner | None = None
        self._place: InPlace | None = None
        self._beat: Beat | None = None

    def __call__(self, text: str) -> None:
        if not self._verbose:
            return
        if self._console.is_jupyter:
            self._place = self._place or InPlace()
            self._place.show(f"{text} ...")
        elif self._console.is_terminal:
            if self._spinner is None:
                self._spinner = self._console.status(Text(f"{text} ..."))
                self._spinner.start()
            self._spinner.update(Text(f"{text} ..."))
        else:
            self.rest()
            self._console.print(f"{text} ...", highlight=False, markup=False, soft_wrap=True)
            start, lines = time.monotonic(), Lines(self._console, _SECONDS_OF_WAITING)
            self._beat = Beat(lambda: lines.offer(f"  still {text} ({time.monotonic() - start:.0f} s)"))

    @property
    def verbose(self) -> bool:
        """Whether it shows anything."""
        return self._verbose

    def line(self, text: str) -> None:
        """A line of its own, which stays."""
        if self._verbose:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def importing(self, module: str) -> None:
        """``module`` is imported, unless that has been done."""
        if module not in sys.modules:
            self(f"importing {module}")

    def rest(self) -> None:
        """Nothing is being done, or others show it."""
        if self._spinner is not None:
            self._spinner.stop()
        if self._place is not None:
            self._place.clear()
        if self._beat is not None:
            self._beat.stop()
        self._spinner = self._place = self._beat = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()


class Beat:
    """Calls ``work`` four times a second, from a thread of its own, until it is stopped."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._stopped = work, threading.Event()
        self._thread = threading.Thread(target=self._run, name="saekit status", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(0.25):
            self._work()

    def stop(self) -> None:
        """It is not called after this."""
        self._stopped.set()
        self._thread.join()


class InPlace:
    """A place in the output of a notebook's cell whose contents change: what is saved with it is the last.

    It needs no widgets.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._last: tuple[str, float | None] | None = None

    def show(self, text: str, *, part: float | None = None, draw: bool = True) -> None:
        """``text``, under a bar of which a ``part`` is full; without ``draw``, only if nothing else comes."""
        self._last = (text, part)
        if draw:
            self._draw(text, part)

    def finish(self) -> None:
        """Draw what was shown last."""
        if self._last is not None:
            self._draw(*self._last)

    def clear(self) -> None:
        """Leave nothing behind."""
        self._last = None
        if self._handle is not None:
            self._handle.update({"text/plain": "", "text/html": ""}, raw=True)

    def _draw(self, text: str, part: float | None) -> None:
        bar = '<progress value="{0:.4f}" max="1" style="width:24em"></progress> {0:.0%}<br>'
        drawn = "" if part is None else bar.format(part)
        line = f'<span style="font-family:monospace;white-space:pre-wrap">{escape(text)}</span>'
        data = {"text/plain": text, "text/html": f"<div>{drawn}{line}</div>"}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
