"""Waiting for processes as long as they are there: threads stand for them, and a store of torch's for theirs."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from saekit.config import DistributedConfig
from saekit.distributed import main_thread, patience, telling, world
from saekit.distributed.agreement import by_first, done_by_all, left_by_all
from saekit.distributed.group import ONE, Group, JoinedGroup, MetGroup
from saekit.distributed.main_thread import MainThread
from saekit.distributed.patience import Meeting, Patience
from saekit.distributed.telling import Telling
from saekit.distributed.world import World
from saekit.errors import LostProcessError, SaekitError, StorageError

Work = Callable[[Group], Any]


class Numbered(Group):
    def __init__(self, size: int) -> None:
        self.size = size


def each(
    size: int, timeout_s: float, work: Work, store: Any = None, silent: tuple[int, ...] = (), stuck_s: float = 60
) -> list[Any]:
    """What ``work`` returns, or raises, in each of so many processes; ``silent`` ones do not say they live."""
    found, store = list[Any]([None] * size), store or dist.HashStore()

    def one(rank: int) -> None:
        mine = Patience(store, rank, timeout_s, stuck_s)
        group = MetGroup(rank, Meeting(mine, "all", range(size)))
        try:
            if rank in silent:
                found[rank] = work(group)
                return
            with mine.beating():
                found[rank] = work(group)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_one_process_waits_for_nobody() -> None:
    assert by_first(ONE, lambda: 7) == 7
    assert done_by_all(ONE, lambda: 8) == 8
    assert ONE.words("why") == ["why"]


def test_the_others_wait_longer_than_the_timeout_while_one_is_at_work() -> None:
    def work(group: Group) -> Any:
        begun = time.monotonic()
        found = [by_first(group, lambda: time.sleep(1) or group.rank), by_first(group, lambda: "next")]
        return found, time.monotonic() - begun

    (first, _), *others = each(3, 0.6, work)
    assert first == [0, "next"]
    for found, seconds in others:
        assert found == [None, None]
        assert seconds >= 1


def test_all_meet_however_late_one_is() -> None:
    """Again and again, and nothing is left in the store but the last of it."""
    store = dist.HashStore()

    def work(group: Group) -> list[float]:
        ends = []
        for turn in range(30):
            time.sleep(0.7 * (group.rank == 2 and turn == 7))
            assert group.words() == ["", "", ""]
            ends.append(time.monotonic())
        return ends

    for ends in zip(*each(3, 0.4, work, store), strict=True):
        assert max(ends) - min(ends) < 0.4
    assert not store.check(["all/20/here"])
    assert store.num_keys() < 15


def test_what_one_cannot_do_nobody_has_done() -> None:
    def work(group: Group) -> None:
        def fails() -> None:
            if group.rank == 1:
                raise OSError(28, "No space left on device")

        done_by_all(group, lambda: None)
        done_by_all(group, fails, "save the SAE")

    errors = each(3, 5, work)
    said = "cannot save the SAE: No space left on device. What was there before is kept"
    for number, error in enumerate(errors):
        assert isinstance(error, StorageError)
        assert str(error) == (said if number == 1 else f"of process 1: {said}")
        assert left_by_all(error, Numbered(3))
        assert not left_by_all(error, Numbered(6))


def test_an_error_is_what_it_was_in_the_others() -> None:
    class GoneError(StorageError):
        pass

    def work(group: Group) -> None:
        def fails() -> None:
            if not group.rank:
                raise GoneError("the folder")

        done_by_all(group, fails, kinds=(GoneError, StorageError))

    assert [(type(error), str(error)) for error in each(2, 5, work)] == [
        (GoneError, "the folder"),
        (GoneError, "of process 0: the folder"),
    ]


def test_one_that_fails_while_the_others_wait_for_it_elsewhere_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a collective, they hear of it when it ends; where they come after all, they find what it said."""
    monkeypatch.setattr(patience, "_FAILED", 0.3)
    over = threading.Event()

    def work(group: Group) -> None:
        def fails() -> None:
            if group.rank:
                raise ValueError("a fault")
            assert over.wait(20)

        try:
            done_by_all(group, fails, kinds=(SaekitError,))
        finally:
            over.set()

    first, second = each(2, 20, work)
    assert isinstance(second, ValueError)
    assert not left_by_all(second, Numbered(2))
    assert str(first) == "of process 1: ValueError: a fault"


def test_one_that_cannot_go_on_is_heard_where_the_others_tell_something() -> None:
    """In another place of the program than where it failed."""
    over = threading.Event()

    def work(group: Group) -> Any:
        if group.rank:
            with contextlib.suppress(ValueError):
                over.wait(20)
                done_by_all(group, lambda: int("many"))
            return None
        joined: Any = JoinedGroup.__new__(JoinedGroup)  # of no engine, which is not asked
        joined._joined, joined._meeting = object(), group._meeting  # type: ignore[attr-defined]
        over.set()
        return joined.objects("mine")

    error, _ = each(2, 20, work)
    assert isinstance(error, LostProcessError)
    assert "process 1: ValueError: invalid literal for int()" in str(error)


def test_words_come_one_after_the_other() -> None:
    def work(group: Group) -> Any:
        meeting = group._meeting  # type: ignore[attr-defined]
        if not group.rank:
            for number in range(5):
                meeting.say(number, 1)
            return meeting.heard(1)
        heard = [meeting.heard(0) for _ in range(5)]
        time.sleep(0.5)
        meeting.say(7, 0)
        return heard

    assert each(2, 0.4, work) == [7, [0, 1, 2, 3, 4]]


def test_one_that_says_nothing_is_given_up() -> None:
    def work(group: Group) -> None:
        if group.rank:
            group.words()

    _, error = each(2, 0.5, work, silent=(0,))
    assert isinstance(error, LostProcessError)
    assert "process 0 has said nothing for 0.5 s (distributed.timeout_s)" in str(error)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a process waits for, and nobody sets; the threads here, which are of one process, are looked at alone."""
    monkeypatch.setattr(main_thread, "_BUSY", 100)
    yield (event := threading.Event())
    event.set()


def test_one_that_does_nothing_is_given_up(hanging: threading.Event) -> None:
    """It says that it is there, from its other thread."""

    def work(group: Group) -> Any:
        if not group.rank:
            return hanging.wait(20)
        try:
            return group.words()
        finally:
            hanging.set()

    _, error = each(2, 1, work, stuck_s=0.5)
    assert isinstance(error, LostProcessError)
    assert re.search(
        r"process 0 has done nothing for 0\.5 s \(distributed\.stuck_s\): it is in threading\.wait \(line \d+\), ",
        str(error),
    )


def test_of_one_that_hangs_in_a_step_it_is_told_where_it_was_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last words; of one that has said nothing, nothing."""
    monkeypatch.setattr(telling, "PATIENCE", 0.05)
    for words, told in (
        ('[7, 0.0, "plugin.measure (line 3)", []]', "; it was last in plugin.measure (line 3)"),
        ("", ""),
    ):
        store, error = dist.HashStore(), LostProcessError("another process of the run has gone")
        if words:
            store.set("beat/1", words)
        Telling(store, 0, 2).account(error)
        assert error.__notes__ == [f"process 1 {telling._GONE}{told}"]


def test_people_are_told_for_whom_processes_wait(
    hanging: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one of those that wait, and not of one that waits as they do."""
    monkeypatch.setattr(patience, "_TELL", 0.4)

    def work(group: Group) -> Any:
        if group.rank == 2:
            hanging.wait(1.3)
        return group.words()

    assert each(3, 1, work) == [["", "", ""]] * 3
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 5
    said = r"process [01] has waited [01] s for process 2, which is in threading\.wait \(line \d+\), in .*\(line \d+\)"
    assert all(re.match(said, line) for line in lines), lines


def test_what_a_process_does_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [0]
    monkeypatch.setattr(main_thread, "_BUSY", 100)
    monkeypatch.setattr(main_thread, "_moved", lambda: moved[0])
    waits, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: [sum(range(10**5)), waits.set(), over.wait(20)])
    thread.start()
    assert waits.wait(20)
    time.sleep(0.05)
    own = MainThread(thread)
    time.sleep(0.05)
    assert 0.05 <= own.idle() < 20
    assert "threading.wait (line " in own.where()
    assert own.idle(waits=True) == 0
    time.sleep(0.05)
    moved[0] = 10**7
    assert own.idle() == 0, "it writes to a disk"
    monkeypatch.setattr(main_thread, "_BUSY", -1)
    assert own.idle() == 0, "other threads compute"
    monkeypatch.setattr(main_thread, "_BUSY", 100)
    over.set()
    thread.join()
    assert own.idle() == 0, "it has gone on"


def test_the_folder_is_waited_for_as_long_as_the_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is a world."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "_store", lambda *rest: dist.HashStore())
    with pytest.raises(LostProcessError, match=r"process 0 has said nothing for 0\.4 s"):
        world.before_others(lambda: None, DistributedConfig(timeout_s=0.4))


def test_one_that_has_left_is_not_waited_for() -> None:
    """Whatever ended its work, also on another machine."""
    _, error = each(2, 60, lambda group: group.words() if group.rank else None)
    assert str(error) == "another process of the run has gone, or does not answer: process 0"


def test_one_whose_work_has_ended_is_waited_for() -> None:
    """It may have a last checkpoint to write with the others, later than they."""
    store = dist.HashStore()

    def work(group: Group) -> Any:
        world = World(all=group, telling=Telling(store, group.rank, 2))
        with contextlib.suppress(KeyboardInterrupt), world.accounted():
            raise KeyboardInterrupt
        return done_by_all(group, lambda: time.sleep(group.rank) or "saved")

    assert each(2, 60, work, store) == ["saved", "saved"]


def test_one_that_was_killed_on_this_machine_is_not_waited_for() -> None:
    place = "from saekit.distributed.patience import _machine; import os; print(_machine(), os.getpid())"
    store = dist.HashStore()
    other = subprocess.run([sys.executable, "-c", place], capture_output=True, text=True, check=True)
    store.set("place/0", other.stdout.strip())
    _, error = each(2, 60, lambda group: group.words() if group.rank else None, store, silent=(0,))
    assert "does not answer: process 0" in str(error)


def test_one_that_has_come_and_ended_has_come() -> None:
    """The others may look for it before they look who has come."""
    store = dist.HashStore()

    def work(group: Group) -> Any:
        if group.rank:
            time.sleep(0.6)
            return group.words()
        return group.words()

    assert each(3, 60, work, store) == [["", "", ""]] * 3


def test_a_store_that_hangs_is_given_up() -> None:
    """Its process is stopped, or its machine is off: torch's would wait without an end."""
    hangs = threading.Event()

    class Hanging:
        def __init__(self) -> None:
            self.store = dist.HashStore()

        def add(self, key: str, number: int) -> int:
            hangs.wait(20)
            return int(self.store.add(key, number))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

    group, begun = MetGroup(1, Meeting(Patience(Hanging(), 1, 0.5), "all", range(2))), time.monotonic()
    with pytest.raises(LostProcessError, match=r"has said nothing for 0\.5 s \(distributed\.timeout_s\)"):
        group.words()
    assert time.monotonic() - begun < 10
    hangs.set()
