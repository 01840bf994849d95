"""What the processes of a run tell each other beside their work: how each ends, and what each has warned of.

So each thing is said once, and where one process goes, the others can say which it was and why.  They tell it by
torch's store, which all can write to and read although some of them have gone.  Imports no torch.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, TypeVar

from saekit.distributed.patience import in_time, place_told
from saekit.errors import LostProcessError
from saekit.reasons import error_text

__all__ = ["Telling", "first_to_warn", "have_met", "told_by"]

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds in which a process that is still there says so, and in which the store answers."""
_FIRST_IS_SOON = 1.0
"""Seconds in which the first process ends as this one did, if it does."""
_FIRST_CLOSES = 60.0
"""Seconds in which the first process has closed what it has open."""
_GONE = "has gone or hangs: it was killed or stopped, or its machine is not there any more"


class Telling:
    """Of one process among ``size``, by a ``store`` of torch's.  Without one, it is told nothing, and says all."""

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._first_says = False
        """Whether the first process has ended as this one has."""
        self.over = False
        """Whether something has ended the work of this process, which leaves it now."""

    # ---- how processes end

    def account(self, error: BaseException) -> None:
        """Tell the others what ends this process, or find out which of them has gone, and why."""
        self.over = True
        if not isinstance(error, LostProcessError):
            self._asked(lambda: self._store.set(f"ended/{self._rank}", error_text(error)), None)
        elif not error.accounted:
            error.accounted = True
            error.add_note(self._of_others())

    def _of_others(self) -> str:
        """What became of the other processes, in words."""
        if self._store is None:
            return "which process it is, is not known"
        others = [rank for rank in range(self._size) if rank != self._rank]
        self._asked(lambda: self._store.set(f"there/{self._rank}", ""), None)
        told: dict[int, str | None] = dict.fromkeys(others)

        def all_told() -> bool:
            told.update({rank: self._told(rank) for rank in others})
            return None not in told.values()

        self._awaited(all_told, PATIENCE)
        if self._store is None:  # it was the process that has the store
            return f"process 0 {_GONE}"
        ends = [f"process {rank} ended: {text}" for rank, text in told.items() if text]
        gone = [f"process {rank} {_GONE}{self._last_in(rank)}" for rank, text in told.items() if text is None]
        return "; ".join([*ends, *gone]) or "all processes are still there"

    def _last_in(self, rank: int) -> str:
        """Where a process was when it last said so, in words."""
        key = f"beat/{rank}"
        beat = self._asked(lambda: str(self._store.get(key).decode()), "") if self._has(key) else ""
        return f"; it was last in {where}" if (where := place_told(beat)) else ""

    def _told(self, rank: int) -> str | None:
        """What ended a process; nothing, where it is there; None: it does not say."""
        if self._has(f"ended/{rank}"):
            return self._asked(lambda: str(self._store.get(f"ended/{rank}").decode()), None)
        return "" if self._has(f"there/{rank}") else None

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Around all that a process does in a run: whoever ends as the first process does leaves after it.

        The first has files and trackers to close, and whoever started the processes may end all as soon as one is gone.
        Signals that say so come too late to change anything, and are passed over.
        """
        with self._passing_over(), _MEETING.of(self):
            try:
                yield
            except BaseException as error:
                setattr(error, "telling", self)  # noqa: B010 - of whatever class it is
                if not self._rank:
                    self._asked(lambda: self._store.set("left", ""), None)
                elif not isinstance(error, LostProcessError):
                    self._awaited(lambda: self._has("ended/0"), _FIRST_IS_SOON)
                    self._first_says = _alike(self._told(0), error_text(error))
                    if self._first_says:
                        self._awaited(lambda: self._has("left"), _FIRST_CLOSES)
                raise

    @contextlib.contextmanager
    def _passing_over(self) -> Iterator[None]:
        previous: dict[signal.Signals, Any] = {}

        def hear(number: int, frame: Any) -> None:
            if not self.over:
                previous[signal.Signals(number)](number, frame)

        if self._size > 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    previous[number] = handler
                    signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ---- what is said of it

    def words(self, error: BaseException, text: str) -> str:
        """What this process is to say of the ``error`` that ended it, of ``text`` or nothing: one says it for all."""
        lost = isinstance(error, LostProcessError)
        others = [rank for rank in range(self._size) if rank != self._rank]
        another = any(self._has(f"ended/{rank}") for rank in others) if lost else self._first_says
        if another and self._awaited(lambda: self._has("said"), PATIENCE):
            return ""
        if self._asked(lambda: int(self._store.add("speakers", 1)), 1) == 1:
            self._asked(lambda: self._store.set("speaker", str(self._rank)), None)
            return text if lost or not self._rank else f"process {self._rank}: {text}"
        self._awaited(lambda: self._has("said"), PATIENCE)
        speaker = self._asked(lambda: int(self._store.get("speaker")), 0)
        if lost or _alike(self._told(speaker), error_text(error)):
            return ""
        return f"process {self._rank} ended, too: {error_text(error).splitlines()[0]}"

    def said(self) -> None:
        """What there was to say is on the screen."""
        self._asked(lambda: self._store.set("said", ""), None)

    def warns_first(self, text: str) -> bool:
        """Whether no other process has warned of this; from now on, one has."""
        key = blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
        return self._asked(lambda: int(self._store.add(f"warned/{key}", 1)), 1) == 1

    # ---- the store

    def _has(self, key: str) -> bool:
        return self._asked(lambda: bool(self._store.check([key])), False)

    def _awaited(self, found: Callable[[], bool], seconds: float) -> bool:
        """Whether ``found`` comes true within so many ``seconds``."""
        deadline = time.monotonic() + seconds
        while not (there := found()) and self._store is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        return there

    def _asked(self, work: Callable[[], T], otherwise: T) -> T:
        """What ``work`` finds in the store; ``otherwise`` where there is none, or none that answers any more."""
        if self._store is None:
            return otherwise
        found: list[T] = []
        with contextlib.suppress(RuntimeError):  # the process that had it has gone
            found = in_time(work, PATIENCE, "saekit store")
        if not found:
            self._store = None
        return found[0] if found else otherwise


class _Meeting:
    """The newest run of this process, in which it has met the others: what they have warned of is told there."""

    def __init__(self) -> None:
        self._now: Telling | None = None
        self._before: list[str] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, telling: Telling) -> Iterator[None]:
        with self._lock:
            self._now, before, self._before = telling, self._before, []
            for text in before:
                telling.warns_first(text)
        yield

    @property
    def met(self) -> bool:
        return self._now is not None

    def first_to_warn(self, text: str) -> bool:
        with self._lock:
            if self._now is None:
                self._before.append(text)
                return True
            return self._now.warns_first(text)


_MEETING = _Meeting()


def have_met() -> bool:
    """Whether this process has met the others of its run."""
    return _MEETING.met


def first_to_warn(text: str) -> bool:
    """Whether no other process has warned of this, as far as is known; now, one has."""
    return _MEETING.first_to_warn(text)


def _alike(one: str | None, other: str) -> bool:
    """Whether two processes have ended by the same: one may tell the words of the other, and where they are from."""
    if not one:
        return False
    stopped = ("KeyboardInterrupt", "TrainingInterrupted")
    return one in other or other in one or (one.startswith(stopped) and other.startswith(stopped))


def told_by(error: BaseException) -> Telling | None:
    """By what the process that ``error`` has ended tells others of it; None: it had not met them."""
    found = getattr(error, "telling", None)
    return found if isinstance(found, Telling) else None
