"""Imports of large libraries, and drawing, do not look for garbage; whoever called finds all as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from saekit.garbage import uncollected


@pytest.fixture(autouse=True)
def _collection() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_it_was_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() == enabled


def test_the_last_thread_turns_it_on_again() -> None:
    gc.enable()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
