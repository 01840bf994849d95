"""A piece of writing in a thread of its own: however it begins and ends, nobody waits for it for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from saekit.runs.writing import GivenUpError, Writing

WAITS = 10  # seconds; what hangs is told


def in_time(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, in a thread: one that hangs is an error."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(WAITS)
    assert found, "it hangs"
    return found[0]


def patient(begun: threading.Event) -> Callable[[Writing], None]:
    def write(writing: Writing) -> None:
        begun.set()
        while True:
            writing.go_on()

    return write


@pytest.mark.parametrize("started", [False, True])
def test_a_ctrl_c_while_the_thread_starts(monkeypatch: pytest.MonkeyPatch, started: bool) -> None:
    """Before it has come to be, or just after."""
    begun = threading.Event()
    writing, start = Writing(patient(begun)), threading.Thread.start

    def pressed(thread: threading.Thread) -> None:
        if started:
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", pressed)
        writing.begin()
    if started:
        assert begun.wait(WAITS)
    in_time(lambda: writing.give_up() or True)
    assert writing.done
    assert not in_time(lambda: [writing.there()])[0]
    assert isinstance(writing.error, GivenUpError) is started


def test_what_is_given_up_before_it_runs_writes_nothing() -> None:
    begun = threading.Event()
    writing = Writing(patient(begun))
    in_time(lambda: writing.give_up() or True)
    writing.begin()  # its thread comes too late
    writing.wait()
    assert not begun.is_set()


def test_without_another_thread_it_writes_where_it_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else of several processes one would not write, and the others would wait for it."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writing, fails = Writing(Writing.is_there), Writing(lambda writing: exec("raise OSError('full')"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writing.begin()
        fails.begin()
    assert writing.done
    assert writing.error is None
    assert in_time(writing.there)
    in_time(lambda: fails.wait() or True)
    assert str(fails.error) == "full"
