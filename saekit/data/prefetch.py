"""A stage run ahead in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Prefetched", "Stage"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Stage(Protocol[T_co]):
    """An iterator that can be stopped at any item and continued elsewhere."""

    def __next__(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Prefetched(Generic[T]):
    """The items of ``stage`` in order, up to ``depth`` of them made ahead by a thread.

    The thread starts with the first item asked for and ends with :meth:`close`, with the data, or with an error, which
    is raised where the item was asked for.  :meth:`state_dict` is the stage's as of the last item handed out, however
    far the thread has gone, so the stage's own states must be small and made anew each time.
    """

    def __init__(self, stage: Stage[T], depth: int = 1) -> None:
        self._stage, self._depth = stage, depth
        self._changed = threading.Condition()
        self._made: deque[tuple[T, dict[str, Any]]] = deque()
        self._failure: BaseException | None = None  # StopIteration too
        self._stopping = self._awaited = False
        self._ahead: int | None = None  # how many items may lie ready, where that is fewer than the depth
        self._thread: threading.Thread | None = None
        self._state: dict[str, Any] | None = None  # None: nothing was handed out, ask the stage

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self.next_of(None)

    def next_of(self, ahead: int | None) -> T:
        """The next item; until another is asked for, no more than ``ahead`` are made after it, whatever the depth."""
        with self._changed:
            self._ahead, self._awaited = ahead, True
            self._changed.notify_all()
        try:
            self._start()
            with self._changed:
                self._changed.wait_for(lambda: self._made or self._failure is not None)
                return self._hand_out()
        finally:
            self._awaited = False

    def available(self) -> bool:
        """Whether the next item, the end or an error is there without waiting.  Starts the thread."""
        self._start()
        with self._changed:
            return bool(self._made) or self._failure is not None

    def _hand_out(self) -> T:
        if not self._made:
            assert self._failure is not None
            if isinstance(self._failure, StopIteration):
                raise StopIteration
            raise self._failure
        item, self._state = self._made.popleft()
        self._awaited = False  # before the thread is told, or it would make one more than was asked for
        self._changed.notify_all()
        return item

    @property
    def _room(self) -> bool:
        """Whether one more may be made."""
        most = self._depth if self._ahead is None else min(self._ahead + self._awaited, self._depth)
        return len(self._made) < most

    def _start(self) -> None:
        if self._stopping and self._thread is not None:  # closing it was interrupted
            self.close()
        if self._thread is None:
            if self._state is not None:  # it was closed, and the stage had gone further
                self._stage.load_state_dict(self._state)
            self._state = self._stage.state_dict()
            self._stopping = False
            self._thread = threading.Thread(target=self._work, name="saekit-prefetch", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._room)
                if self._stopping:
                    return
            try:
                item = next(self._stage)
                state = self._stage.state_dict()
            except BaseException as error:  # whatever it is, it belongs to the caller
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made.append((item, state))
                self._changed.notify_all()
            del item, state  # else this frame would hold the last ones while it waits

    def state_dict(self) -> dict[str, Any]:
        """The stage's state as of the last item handed out."""
        return self._stage.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self.close()
        self._stage.load_state_dict(state)
        self._state = None

    def close(self) -> None:
        """End the thread; what it has made ahead is made again if it is asked for."""
        if self._thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._thread, self._failure = None, None
        self._made.clear()
