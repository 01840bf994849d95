"""Waiting for a process as long as it is at work, however long that takes.

In a collective, processes wait for each other until ``distributed.timeout_s``.  Where one has something to do that
takes its time, it says from time to time that it is there, in the store that all can read, and the others wait.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from saekit.distributed.world import World
from saekit.errors import LostProcessError

__all__ = ["at_work", "by_first", "met"]

T = TypeVar("T")

_BEAT = 1.0
"""Seconds after which a process says again that it is there."""
_SOONEST, _LATEST = 0.01, 0.5
"""Seconds after which one looks again for what it waits for: later and later."""


@contextlib.contextmanager
def at_work(world: World) -> Iterator[None]:
    """While the context is open, this process says that it is there: in a thread, whatever it does meanwhile."""
    if world.store is None:
        yield
        return
    ended = threading.Event()
    _asked(world, lambda: world.store.set(f"place/{world.rank}", f"{_machine()} {os.getpid()}"))

    def beat() -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # the store has gone, which who asks it next finds out
            while not ended.is_set():
                world.store.set(f"beat/{world.rank}", str(number := number + 1))
                ended.wait(min(_BEAT, world.timeout_s / 4))

    thread = threading.Thread(target=beat, name="saekit-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(min(world.timeout_s, threading.TIMEOUT_MAX))  # where the store hangs, so does the thread


def by_first(world: World, work: Callable[[], T]) -> T | None:
    """What ``work`` returns, in the first process; the others wait until it is done, as long as the first is there.

    None in these, in which :class:`LostProcessError` is raised where the first has ended.
    """
    number = next(world.turns)
    if world.size == 1:
        return work()
    if world.store is None:
        found = work() if world.main else None
        world.all.objects(None)
        return found
    if not world.main:
        _wait_for(world, 0, f"done/{number}")
        return None
    with at_work(world):
        found = work()
    _asked(world, lambda: world.store.set(f"done/{number}", ""))
    return found


def met(world: World) -> None:
    """Wait until all processes have come here, as long as those that have not are there and :func:`at_work`."""
    number = next(world.turns)
    if world.size == 1 or world.store is None:
        return
    _asked(world, lambda: world.store.set(f"met/{number}/{world.rank}", ""))
    for rank in range(world.size):
        if rank != world.rank:
            _wait_for(world, rank, f"met/{number}/{rank}")


def _asked(world: World, work: Callable[[], T]) -> T:
    """What ``work`` finds in the store; :class:`LostProcessError` where the process that has it has gone, or hangs.

    In a thread: torch's store waits for an answer without an end.
    """
    found: list[T] = []
    failed: list[RuntimeError] = []

    def ask() -> None:
        try:
            found.append(work())
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=ask, name="saekit-store", daemon=True)
    thread.start()
    thread.join(min(world.timeout_s, threading.TIMEOUT_MAX))
    if found:
        return found[0]
    silent = f"the process by which they tell each other has said nothing for {world.timeout_s:g} s"
    why = failed[0] if failed else f"{silent} (distributed.timeout_s)"
    raise LostProcessError(f"another process of the run has gone, or does not answer: {why}") from next(
        iter(failed), None
    )


def _wait_for(world: World, rank: int, key: str) -> None:
    """Until the process ``rank`` has set ``key``; :class:`LostProcessError` when it has ended, or says nothing."""
    heard, at, pause = "", time.monotonic(), _SOONEST

    def look() -> tuple[bool, bool, str]:
        """Whether the key is there; else whether the process has ended, and its last beat."""
        if world.store.check([key]):
            return True, False, ""
        ended = _told(world, f"ended/{rank}") is not None or _is_gone(_told(world, f"place/{rank}"))
        return False, ended, _told(world, f"beat/{rank}") or ""

    while True:
        there, ended, beat = _asked(world, look)
        if there:
            return
        if ended:
            raise LostProcessError(f"another process of the run has gone, or does not answer: process {rank}")
        if beat != heard:
            heard, at = beat, time.monotonic()
        elif time.monotonic() - at > world.timeout_s:
            raise LostProcessError(
                f"another process of the run has gone, or does not answer: process {rank} has said nothing for "
                f"{world.timeout_s:g} s (distributed.timeout_s)"
            )
        time.sleep(pause)
        pause = min(1.3 * pause, _LATEST)


def _told(world: World, key: str) -> str | None:
    return str(world.store.get(key).decode()) if world.store.check([key]) else None


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
