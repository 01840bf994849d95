"""Waiting for a process that is at work: threads stand for the others, and a store of torch's for theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from support import warm

from saekit.distributed import ALONE, World
from saekit.distributed.group import Group
from saekit.distributed.patience import at_work, by_first, met
from saekit.errors import LostProcessError


class Numbered(Group):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def worlds(size: int, timeout_s: float) -> list[World]:
    store = dist.HashStore()
    return [World(Numbered(rank, size), store=store, timeout_s=timeout_s) for rank in range(size)]


def each(size: int, timeout_s: float, work: Callable[[World], Any]) -> list[Any]:
    """What ``work`` returns, or raises, on each of so many processes."""
    found: list[Any] = [None] * size

    def one(world: World) -> None:
        try:
            found[world.rank] = work(world)
        except LostProcessError as error:
            found[world.rank] = error

    threads = [threading.Thread(target=one, args=(world,)) for world in worlds(size, timeout_s)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_one_process_waits_for_nobody() -> None:
    assert by_first(ALONE, lambda: 7) == 7
    met(ALONE)
    with at_work(ALONE):
        assert not [thread for thread in threading.enumerate() if thread.name == "saekit-beat"]


def test_the_others_wait_longer_than_the_timeout_while_the_first_is_there() -> None:
    def work(world: World) -> Any:
        begun = time.monotonic()
        found = [by_first(world, lambda: time.sleep(2) or world.rank), by_first(world, lambda: "next")]
        return found, time.monotonic() - begun

    (first, _), *others = each(3, 1.5, work)
    assert first == [0, "next"]
    for found, seconds in others:
        assert found == [None, None]
        assert seconds >= 2


def test_all_meet_however_late_one_is() -> None:
    def work(world: World) -> float:
        with at_work(world):
            time.sleep(2 * (world.rank == 2))
            met(world)
            return time.monotonic()

    ends = each(3, 1.5, work)
    assert max(ends) - min(ends) < 1


def test_one_that_says_nothing_is_given_up() -> None:
    def work(world: World) -> None:
        if world.rank:
            met(world)

    _, error = each(2, 0.5, work)
    assert "process 0 has said nothing for 0.5 s (distributed.timeout_s)" in str(error)


def test_one_that_has_ended_is_not_waited_for() -> None:
    def work(world: World) -> None:
        if not world.rank:
            world.store.set("ended/0", "a full disk")
            return
        by_first(world, lambda: None)

    _, error = each(2, 60, work)
    assert str(error) == "another process of the run has gone, or does not answer: process 0"


def test_one_that_was_killed_on_this_machine_is_not_waited_for() -> None:
    place = "from saekit.distributed.patience import _machine; import os; print(_machine(), os.getpid())"
    gone = warm.python("-c", place).stdout.strip()

    def work(world: World) -> None:
        world.store.set("place/0", gone)
        if world.rank:
            by_first(world, lambda: None)

    _, error = each(2, 60, work)
    assert "does not answer: process 0" in str(error)


def test_a_store_that_hangs_is_given_up() -> None:
    """Its process is stopped, or its machine is off: torch's would wait without an end."""
    hangs = threading.Event()

    class Hanging:
        def __init__(self) -> None:
            self.store = dist.HashStore()

        def check(self, keys: list[str]) -> bool:
            hangs.wait(20)
            return bool(self.store.check(keys))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

    world, begun = World(Numbered(1, 2), store=Hanging(), timeout_s=0.5), time.monotonic()
    with pytest.raises(LostProcessError, match=r"has said nothing for 0\.5 s \(distributed\.timeout_s\)"):
        by_first(world, lambda: None)
    assert time.monotonic() - begun < 10
    hangs.set()
