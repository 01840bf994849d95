"""The prefetch thread: same items, the state of the last one handed out, errors to the caller, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.data import Prefetched


class Counter:
    """A stage that counts to ``n``, then ends or fails."""

    def __init__(self, n: int, error: BaseException | None = None, delay: float = 0.0) -> None:
        self.n, self.error, self.delay = n, error, delay
        self.at = 0
        self.made = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        time.sleep(self.delay)
        if self.at == self.n:
            raise self.error or StopIteration
        self.at, self.made = self.at + 1, self.made + 1
        return self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "saekit-prefetch"]


@settings(max_examples=50)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 14), st.booleans())
def test_the_items_and_the_state_of_the_last_one(n: int, depth: int, taken: int, closed: bool) -> None:
    one = Prefetched(Counter(n), depth)
    seen = [item for _, item in zip(range(taken), one, strict=False)]
    assert seen == list(range(1, min(n, taken) + 1))
    state = one.state_dict()
    assert state == {"at": len(seen)}
    two = Prefetched(Counter(n), depth)
    two.load_state_dict(state)
    rest = list(range(len(seen) + 1, n + 1))
    assert list(two) == rest
    if closed:
        one.close()  # what was made ahead is made again
    assert list(one) == rest
    one.close()
    two.close()
    assert not threads()


def test_it_runs_ahead_but_not_further_than_it_may() -> None:
    stage = Counter(100)
    ahead = Prefetched(stage, depth=3)
    assert next(ahead) == 1
    deadline = time.monotonic() + 10
    while stage.made < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert stage.made == 4, "one handed out and three ahead"
    assert ahead.available()
    ahead.close()


def test_an_error_reaches_the_caller_after_the_items_before_it() -> None:
    ahead = Prefetched(Counter(2, error=OSError("the model is gone")))
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):  # and again, for whoever asks again
        with pytest.raises(OSError, match="the model is gone"):
            next(ahead)
    ahead.close()
    assert not threads()


def test_closing_does_not_wait_for_the_caller() -> None:
    ahead = Prefetched(Counter(10**6, delay=0.001), depth=1)
    next(ahead)
    start = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - start < 5
    assert not threads()


def test_nothing_runs_before_the_first_item() -> None:
    stage = Counter(3)
    ahead = Prefetched(stage)
    assert ahead.state_dict() == {"at": 0}
    assert not threads()
    assert not stage.made
