"""Several readers of one text: each forward runs once, and no more is kept than somebody still needs."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from saekit import Forward
from saekit.data.shared import ForwardsReader, SharedForwards
from saekit.protocols import ModelBackend
from saekit.runs.session import end_lane
from saekit.testing import FakeBackend

FIRST, LAST, HEADS = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


class CountingBackend(FakeBackend):
    """Knows what it was asked for: the tokens of each forward, and its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[bytes, frozenset[str]]] = []

    def run(self, tokens: Tensor, **options: Any) -> Forward:
        self.ran.append((tokens.numpy().tobytes(), frozenset(options["read"])))
        return super().run(tokens, **options)


class Reading:
    """A reader on its way through a text of ``[n, 4]`` token ids."""

    def __init__(self, shared: SharedForwards, hooks: Collection[str], at_once: int = 2) -> None:
        self.reader: ForwardsReader = shared.reader(hooks)
        self.place: int | None = 0
        self.at_once = at_once
        self.reader.follow(lambda: self.place)

    def next(self) -> Mapping[str, Tensor]:
        """Read on; checked against what the model alone gives."""
        assert self.place is not None
        tokens = text(self.place, self.at_once)
        self.place += self.at_once
        found = self.reader.run(tokens, read=self.reader.hooks).held
        expected = FakeBackend().run(tokens, read=self.reader.hooks).held
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        return found


def text(start: int, n: int) -> Tensor:
    return torch.arange(4 * start, 4 * (start + n)).reshape(n, 4) % 128


def bytes_of_a_forward(hooks: int = 1) -> int:
    return hooks * 2 * 4 * 8 * 4


def test_each_forward_runs_once_for_all_hooks_and_readers() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    readers = [Reading(shared, {FIRST}), Reading(shared, {LAST}), Reading(shared, {FIRST, HEADS})]
    for lag in (3, 1, 2):
        for reading in readers:
            for _ in range(lag):
                reading.next()
    assert len(backend.ran) == 6
    assert {hooks for _, hooks in backend.ran} == {frozenset({FIRST, LAST, HEADS})}
    assert shared.nbytes == 0, "everybody has taken everything"


def test_what_is_kept_is_what_somebody_still_needs() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    ahead, behind = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    for n in range(1, 6):
        ahead.next()
        assert shared.nbytes == n * bytes_of_a_forward()
    for n in range(4, -1, -1):
        behind.next()
        assert shared.nbytes == n * bytes_of_a_forward()
    behind.next()  # now it leads
    ahead.next()
    assert len(backend.ran) == 6


def test_what_does_not_fit_is_run_again() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend, most_bytes=2 * bytes_of_a_forward() + 1)
    ahead, behind = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    for _ in range(5):
        ahead.next()
        assert shared.nbytes <= 2 * bytes_of_a_forward()
    for _ in range(5):
        behind.next()  # which checks the result
    assert len(backend.ran) == 5 + 3, "two were there"
    assert shared.nbytes == 0
    ahead.next(), behind.next()
    assert len(backend.ran) == 9, "side by side they share again"


def test_a_reader_that_has_all_it_needs_holds_nothing_back() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    going, gone, other = Reading(shared, {FIRST}), Reading(shared, {LAST}), Reading(shared, {HEADS})
    going.next(), other.next()
    assert shared.nbytes == bytes_of_a_forward(3)
    gone.reader.release()
    assert shared.nbytes == 0
    for _ in range(3):
        going.next(), other.next()
    assert shared.nbytes == 0
    assert backend.ran[-1][1] == {FIRST, HEADS}, "its hooks cost nothing any more"
    gone.reader.release()  # twice is no mistake
    before = len(backend.ran)
    gone.next()
    assert len(backend.ran) == before + 1, "it may still read, as the thread of a source may"
    other.next(), going.next()
    assert shared.nbytes == 0


def test_a_reader_that_reads_no_text_is_not_waited_for() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    reading, cached = Reading(shared, {FIRST}), Reading(shared, {LAST})
    cached.place = None
    reading.next()
    assert shared.nbytes == 0
    assert backend.ran[-1][1] == {FIRST}
    probe = torch.zeros(1, 7, dtype=torch.long)
    found = cached.reader.run(probe, read={LAST}).held
    assert torch.equal(found[LAST], FakeBackend().run(probe, read={LAST}).held[LAST])
    assert shared.nbytes == 0


def test_readers_with_forwards_of_other_sizes_pass_what_they_do_not_take() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    twos, threes = Reading(shared, {FIRST}, 2), Reading(shared, {FIRST}, 3)
    most = 0
    for _ in range(100):
        min(twos, threes, key=lambda reading: reading.place).next()
        most = max(most, shared.nbytes)
    assert len(backend.ran) == 100
    assert most <= 2.5 * bytes_of_a_forward(), "one of two contexts and one of three"


def test_text_that_is_read_again_is_not_mistaken_for_text_that_was_passed() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    ahead, behind = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    rounds = 3 * 16  # 16 forwards of two contexts are 128 tokens, and then they come again
    for _ in range(rounds):
        ahead.next()
    for _ in range(rounds):
        behind.next()
    assert len(backend.ran) == rounds
    assert shared.nbytes == 0


def test_readers_that_start_at_different_places_share_what_is_common() -> None:
    """As after a resume, when one had gone further."""
    backend = CountingBackend()
    shared = SharedForwards(backend)
    ahead, behind = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    ahead.place = 6
    for _ in range(3):
        ahead.next()
    for _ in range(6):
        behind.next()
    assert len(backend.ran) == 6
    assert shared.nbytes == 0


def test_other_hooks_than_were_announced() -> None:
    shared = SharedForwards(CountingBackend())
    one, other = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    one.next()
    other.place = 2
    found = other.reader.run(text(0, 2), read={HEADS}).held
    assert torch.equal(found[HEADS], FakeBackend().run(text(0, 2), read={HEADS}).held[HEADS])
    assert shared.nbytes == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_what_is_kept_is_given_up_before_the_model_runs_out_of_memory(error: BaseException) -> None:
    class Full(CountingBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            if shared.nbytes > 2 * bytes_of_a_forward():
                raise error
            return super().run(tokens, **options)

    backend = Full()
    shared = SharedForwards(backend)
    ahead, behind = Reading(shared, {FIRST}), Reading(shared, {FIRST})
    for _ in range(4):
        ahead.next()
    assert shared.nbytes == bytes_of_a_forward(), "three were given up for the fourth"
    for _ in range(4):
        behind.next()
    assert len(backend.ran) == 7


def test_an_error_of_the_model_is_the_readers() -> None:
    class Broken(FakeBackend):
        def run(self, tokens: Tensor, **options: Any) -> Forward:
            raise RuntimeError("it broke")

    reading = Reading(SharedForwards(Broken()), {FIRST})
    with pytest.raises(RuntimeError, match="it broke"):
        reading.next()


def test_readers_in_threads() -> None:
    backend = CountingBackend()
    shared = SharedForwards(backend)
    readers = [Reading(shared, {hook}) for hook in (FIRST, LAST, HEADS, FIRST)]
    failures: list[BaseException] = []

    def read(reading: Reading, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                reading.next()
                threading.Event().wait(rng.random() / 2000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(reading, n)) for n, reading in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(backend.ran) == 60
    assert shared.nbytes == 0


def test_a_reader_is_the_model_in_all_else() -> None:
    backend: Any = FakeBackend()
    backend.own = "what only this backend has"
    reader = SharedForwards(backend).reader({FIRST})
    for name in [name for name in vars(ModelBackend) | ModelBackend.__annotations__ if not name.startswith("_")]:
        assert hasattr(reader, name), name
    tokens = text(0, 2)
    found, expected = (model.run(tokens, replace={FIRST: torch.zeros_like}, want="loss") for model in (reader, backend))
    assert torch.equal(found.loss, expected.loss)
    assert reader.hook_names() == backend.hook_names()
    assert reader.token_texts(reader.tokenize("abc")) == ["a", "b", "c"]
    for name in ("name", "device", "n_ctx", "d_vocab", "special_tokens", "own"):
        assert getattr(reader, name) == getattr(backend, name)


def test_a_lane_that_ends_stops_working_ahead_before_it_gives_up_what_is_kept() -> None:
    """A forward that its thread made later would be shared with nobody, and run again what others have had."""
    calls: list[str] = []

    class Source:
        def pause(self) -> None:
            calls.append("pause")

    end_lane(Source(), lambda: calls.append("release"))  # type: ignore[arg-type]
    end_lane(object(), lambda: calls.append("release"))  # type: ignore[arg-type]
    assert calls == ["pause", "release", "release"]
