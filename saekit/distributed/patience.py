"""Processes that wait for each other as long as all are there, however long one of them is at work.

In a collective of the engine's they wait until ``distributed.timeout_s``, which is for the messages of a step.  What
else they agree on may take any time: a disk is slow, or one process measures what the others do not.  There, each says
in torch's store that it has come; and as long as a run lasts it says there from time to time that it is there, from a
thread, whatever it does meanwhile, and what that is.  So one that has gone, or says nothing for
``distributed.timeout_s``, or does nothing for ``distributed.stuck_s``, is named; of one that is long at work, the
others say so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from saekit.distributed.main_thread import MainThread
from saekit.errors import LostProcessError

__all__ = ["Meeting", "Patience", "in_time", "place_told"]

T = TypeVar("T")

_BEAT = 1.0
"""Seconds after which a process says again that it is there."""
_SOONEST, _LATEST = 0.0005, 0.5
"""Seconds after which one looks again for what it waits for: later and later."""
_LONG = 0.3
"""Seconds after which it looks whether the others are there."""
_AT_ONCE = 8
"""Of so many others at a time: all of many would ask the store for all of many."""
_TELL = 300.0
"""Seconds of waiting after which people are told for whom, again and again."""
_FAILED = 5.0
"""Seconds in which one that has failed waits for the others: it may be it that they wait for, in a collective."""


class Patience:
    """Of the process ``rank`` of a world, by a ``store`` of torch's that all of it can write to and read."""

    def __init__(self, store: Any, rank: int, timeout_s: float, stuck_s: float = float("inf")) -> None:
        """``timeout_s``, in which a process must say that it is there, and ``stuck_s``, in which it must do
        something."""
        self.store, self.rank = store, rank
        self._timeout_s, self._stuck_s = timeout_s, stuck_s
        self._waits: list[str] = []
        """Where threads of this process wait for others."""

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """While the context is open, this process says that it is there, and what the thread is at that opens it."""
        ended, own = threading.Event(), MainThread()
        self.asked(lambda: self.store.set(f"place/{self.rank}", f"{_machine()} {os.getpid()}"))

        def beat() -> None:
            pause = min(_BEAT, self._timeout_s / 4)
            for number in itertools.count():
                with contextlib.suppress(RuntimeError):  # where the store has gone, who asks it next finds out
                    waits = [*self._waits]
                    told = [number, round(own.idle(waits=bool(waits)), 1), own.where(), waits]
                    self.store.set(f"beat/{self.rank}", json.dumps(told))
                if ended.wait(pause):
                    break
            with contextlib.suppress(RuntimeError):
                self.store.set(f"gone/{self.rank}", "")

        thread = threading.Thread(target=beat, name="saekit-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(min(self._timeout_s, _FAILED))  # where the store hangs, so does the thread

    def until(
        self, there: Callable[[], T | None], whom: Sequence[int], most: float | None = None, *, place: str
    ) -> T | None:
        """What ``there`` finds in the store, when it does, as long as each of the processes ``whom`` is there.

        None when so many seconds have gone by, where ``most`` says so.  ``place`` is that of no other waiting: those of
        ``whom`` that are there, too, are not waited for.
        """
        begun = looked = time.monotonic()
        pause, others, heard, told = _SOONEST, itertools.cycle(whom), dict[int, tuple[str, float]](), begun
        self._waits.append(place)
        try:
            while (found := self.asked(there)) is None:
                now = time.monotonic()
                if most is not None and now - begun > most:
                    return None
                if now - looked > _LONG:
                    looked = now
                    for rank in itertools.islice(others, min(len(whom), _AT_ONCE)):
                        # One that came and has ended since then is not waited for.
                        if (why := self._why_not_there(rank, heard)) and self.asked(there) is None:
                            raise LostProcessError(f"another process of the run has gone, or does not answer: {why}")
                if now - told > _TELL:
                    told = now
                    self._tell(now - begun, [rank for rank in whom if place not in _Beat.of(heard.get(rank)).waits])
                time.sleep(pause)
                pause = min(1.3 * pause, _LATEST)
        finally:
            self._waits.remove(place)
        return found

    def _tell(self, seconds: float, whom: Sequence[int]) -> None:
        """On the terminal, that this process waits for ``whom``; of those that wait for them, one says so."""
        for rank in whom:
            turn = int(time.time() // _TELL)
            key, before = f"waits/{rank}/{turn}", f"waits/{rank}/{turn - 2}"

            def first(key: str = key, before: str = before) -> bool:
                self.store.delete_key(before)
                return int(self.store.add(key, 1)) == 1

            if not self.asked(first):
                continue
            beat = _Beat.of((self.asked(lambda rank=rank: self._told(f"beat/{rank}")) or "", 0.0))  # type: ignore[misc]
            sys.stderr.write(f"process {self.rank} has waited {seconds:.0f} s for process {rank}, which {beat.doing}\n")
            sys.stderr.flush()

    def _why_not_there(self, rank: int, heard: dict[int, tuple[str, float]]) -> str:
        """Why another process need not be waited for, in words, or nothing; its last words are ``heard``."""

        def look() -> tuple[bool, str]:
            # Not whether its work has ended: it may still write a checkpoint with the others.
            gone = self.store.check([f"gone/{rank}"]) or _is_gone(self._told(f"place/{rank}"))
            return gone, self._told(f"beat/{rank}") or ""

        gone, beat = self.asked(look)
        if gone:
            return f"process {rank}"
        now = time.monotonic()
        before, since = heard.setdefault(rank, (beat, now))
        if beat != before:
            heard[rank] = beat, now
        elif now - since > self._timeout_s:
            return f"process {rank} has said nothing for {self._timeout_s:g} s (distributed.timeout_s)"
        told = _Beat.of((beat, now))
        if told.idle > self._stuck_s and not told.waits:
            return f"process {rank} has done nothing for {self._stuck_s:g} s (distributed.stuck_s): it {told.doing}"
        return ""

    def _told(self, key: str) -> str | None:
        return str(self.store.get(key).decode()) if self.store.check([key]) else None

    def asked(self, work: Callable[[], T]) -> T:
        """What ``work`` finds in the store.

        :class:`LostProcessError` where the process that has it has gone, or hangs.
        """
        try:
            found = in_time(work, min(self._timeout_s, threading.TIMEOUT_MAX), "saekit-store")
        except RuntimeError as error:
            raise LostProcessError(f"another process of the run has gone, or does not answer: {error}") from error
        if not found:
            raise LostProcessError(
                "another process of the run has gone, or does not answer: the process by which they tell each other "
                f"has said nothing for {self._timeout_s:g} s (distributed.timeout_s)"
            )
        return found[0]


class _Beat:
    """What a process said last."""

    def __init__(self, idle: float = 0.0, where: str = "", waits: Sequence[str] = ()) -> None:
        self.idle, self.where, self.waits = idle, where, waits

    @classmethod
    def of(cls, heard: tuple[str, float] | None) -> _Beat:
        """Of its words; of none, nothing is known."""
        return cls(*json.loads(heard[0])[1:]) if heard is not None and heard[0] else cls()

    @property
    def doing(self) -> str:
        """What it does, in words that follow on it."""
        if self.waits:
            return "waits for others elsewhere"
        idle = f", and has done nothing for {self.idle:.0f} s" if self.idle > 2 * _BEAT else ""
        return f"is in {self.where or 'a place that it did not say'}{idle}"


def place_told(beat: str) -> str:
    """Where a process was, by its last words; empty where it did not say."""
    return _Beat.of((beat, 0.0)).where


def in_time(work: Callable[[], T], seconds: float, name: str) -> list[T]:
    """What ``work`` returns or raises, where it does within so many ``seconds``; else nothing.

    In a thread of this ``name``, which is left alone then: torch's store waits for an answer without an end.
    """
    found: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return found


class Meeting:
    """Where the processes ``ranks`` of a world meet, again and again: all in one order, one thread of each.

    ``name`` is that of no other meeting of the world.
    """

    def __init__(self, patience: Patience, name: str, ranks: Sequence[int]) -> None:
        self._patience, self._name, self._ranks = patience, name, list(ranks)
        self._others = [rank for rank in ranks if rank != patience.rank]
        self._turn, self._words = 0, Counter[tuple[int, int]]()
        self._said = set[str]()
        self.size = len(self._ranks)

    def words(self, word: str = "") -> list[str] | None:
        """What each says, by their order, when all have come: nothing, or why it cannot do what all do.

        None, where this one cannot and the others do not come soon: they may wait for it elsewhere.  They find what it
        has said when they come.
        """
        own, store, place = self._patience.rank, self._patience.store, f"{self._name}/{self._turn}"
        left = f"{self._name}/{self._turn - 2}"  # by all, for all have come to the one after it
        self._turn += 1

        def come() -> None:
            if word:
                store.set(f"{place}/word/{own}", word)
                store.add(f"{place}/words", 1)
                self._said.add(place)
            store.add(f"{place}/here", 1)
            if own == self._ranks[0]:
                store.delete_key(f"{left}/here")
            if left in self._said:
                self._said.remove(left)
                store.delete_key(f"{left}/word/{own}")
                store.delete_key(f"{left}/words")

        def all_here() -> bool | None:
            return True if int(store.add(f"{place}/here", 0)) == len(self._ranks) else None

        def said() -> list[str]:
            if not store.check([f"{place}/words"]):
                return [""] * len(self._ranks)
            keys = [f"{place}/word/{rank}" for rank in self._ranks]
            return [str(store.get(key).decode()) if store.check([key]) else "" for key in keys]

        self._patience.asked(come)
        most = _FAILED if word else None
        if self._patience.until(all_here, self._others, most, place=place) is None:
            return None
        return self._patience.asked(said)

    def say(self, word: int, to: int) -> None:
        """A word to the process of this number among them, which comes to hear it."""
        key, store = self._key(self._patience.rank, self._ranks[to]), self._patience.store
        self._patience.asked(lambda: store.set(key, str(word)))

    def heard(self, of: int) -> int:
        """The next word of the process of this number to this one."""
        rank, store = self._ranks[of], self._patience.store
        key = self._key(rank, self._patience.rank)

        def word() -> int | None:
            if not store.check([key]):
                return None
            found = int(store.get(key))
            store.delete_key(key)
            return found

        found = self._patience.until(word, [rank], place=key)
        assert found is not None
        return found

    def _key(self, of: int, to: int) -> str:
        number = self._words[of, to]
        self._words[of, to] += 1
        return f"{self._name}/{of}-{to}/{number}"


def _is_gone(place: str | None) -> bool:
    """Whether a process of this machine that was at ``place`` is not there any more: it need not be waited for."""
    machine, _, number = (place or "").rpartition(" ")
    if machine != _machine():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        pass
    return False


def _machine() -> str:
    """Where the numbers of processes are the same; machines may have the same name, and containers the same kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()
