"""What is written to the disk in a thread of its own, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["GivenUpError", "Writing"]


class GivenUpError(Exception):
    """Nobody waits for what was being written any more."""


class Writing:
    """One piece of writing, in a thread of its own from :meth:`begin` on.

    A process that ends waits for it, however it ends but by a kill.
    """

    def __init__(self, write: Callable[[Writing], None]) -> None:
        """``write`` is called in the thread; it asks :meth:`go_on` from time to time, and says :meth:`is_there`."""
        self.error: BaseException | None = None
        """What ended it before it was done; known when it is :attr:`done`."""
        self._there = self._given_up = self._runs = False
        self._known, self._ended = threading.Event(), threading.Event()
        self._deciding = threading.Lock()  # whether it runs, or is given up before that
        self._write = write
        self._thread = threading.Thread(target=self._work, name="saekit-checkpoint")

    def begin(self) -> None:
        """Start the thread; where the system has no more of them, this writes, and returns when it is done."""
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            self._work()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Wait for its end."""
        self._ended.wait()
        if self._thread.is_alive():
            self._thread.join()

    def give_up(self) -> None:
        """Nobody wants it any more: wait until nothing is left of what is half written.

        The thread may never have come to run, for a Ctrl-C can come while it starts.
        """
        with self._deciding:
            self._given_up = True
            if not self._runs:
                self._close()
        self.wait()

    def there(self) -> bool:
        """Wait until it is known, and say, whether what was to be written is there."""
        self._known.wait()
        return self._there

    def _close(self) -> None:
        self._write = _nothing  # and with it the copy that was to be written
        self._known.set()
        self._ended.set()

    # ---- for the thread

    def go_on(self) -> None:
        """:class:`GivenUpError` when nobody waits for it any more."""
        if self._given_up:
            raise GivenUpError

    def is_there(self) -> None:
        """All is on the disk; what else there is to do comes after this."""
        self._there = True
        self._known.set()

    def _work(self) -> None:
        with self._deciding:
            if self._given_up:
                return
            self._runs = True
        try:
            self._write(self)
        except BaseException as error:  # whatever it is, it belongs to the loop
            self.error = error
        finally:
            self._close()


def _nothing(writing: Writing) -> None:
    """It is done."""
