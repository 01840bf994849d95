"""What several readers of a text have left goes to others: nothing is lost, nothing is read twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saekit_plugins.sources.live import LiveConfig

import saekit
from saekit.data import ContextStream, Documents, ShuffleBuffer, StreamContext, TokenPolicy, buffer_handed_over
from saekit.errors import DataError
from saekit.runs.state_files import read_state, write_state
from saekit.testing import FakeBackend
from saekit.values import Batch

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
PUT_IN = 127
LENGTHS = [1 + (37 * n + n * n) % 90 if n % 2 else 3 + n % 9 for n in range(70)]
"""Every other document is long, so that readers come to very different places."""
TEXT = [list(range(length)) for length in LENGTHS]
TOKENS = Counter((number, token) for number, tokens in enumerate(TEXT) for token in tokens)
MESHES = [(1, 2), (2, 1), (4, 2), (2, 4), (2, 4, 1), (3, 2, 5, 3), (2, 2)]


def stream_of(
    part: tuple[int, int] = (0, 1),
    *,
    text: Sequence[Any] = TEXT,
    policy: TokenPolicy | None = None,
    repeat: bool = False,
) -> ContextStream:
    policy = policy or TokenPolicy(context_size=8)
    return ContextStream(Documents(text).part(*part), list, policy, d_vocab=128, repeat=repeat)


def of_next(streams: Sequence[ContextStream], processes: int, **options: Any) -> list[ContextStream]:
    states = [stream.state_dict() for stream in streams]
    found = [stream_of((number, processes), **options) for number in range(processes)]
    for stream in found:
        stream.load_state_dict(stream.taken_over(states))
    return found


def tokens_of(contexts: Iterable[Any]) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for taken in contexts:
        found.update(zip(taken.documents.ravel().tolist(), taken.tokens.ravel().tolist(), strict=True))
    return Counter({pair: count for pair, count in found.items() if pair[1] != PUT_IN})


def waiting(packer: Any) -> Counter[tuple[int, int]]:
    """What does not fill a context when the text ends."""
    pairs = zip(packer["documents"], packer["tokens"], strict=True)
    return Counter(pair for pair in pairs if pair[1] != PUT_IN)


@given(
    meshes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    takes=st.lists(st.integers(0, 14), min_size=20, max_size=20),
    missing=st.sets(st.integers(0, 10), max_size=1),
)
def test_every_document_is_read_once_in_every_reading(meshes: list[int], takes: list[int], missing: set[int]) -> None:
    """Readers that take over in other readings than others are, and may take over again before these have ended."""
    text = [[] if number in missing else [number] for number in range(11)]
    options: dict[str, Any] = {"text": text, "policy": TokenPolicy(context_size=1), "repeat": True}
    seen: Counter[tuple[int, int]] = Counter()
    steps = iter(takes)

    def take(stream: ContextStream) -> None:
        document = int(stream.take(1).tokens[0, 0])
        seen[stream.readings, document] += 1

    streams = [stream_of((number, meshes[0]), **options) for number in range(meshes[0])]
    for processes in meshes[1:]:
        for stream in streams:
            for _ in range(next(steps, 3)):
                take(stream)
        streams = of_next(streams, processes, **options)
    last = max((reading for reading, _ in seen), default=0) + 1
    for stream in streams:
        while stream.readings <= last:
            take(stream)
    known = {number for number in range(11) if number not in missing}
    for reading in range(last + 1):
        assert Counter({d: n for (r, d), n in seen.items() if r == reading}) == Counter(known), reading


@pytest.mark.parametrize("meshes", MESHES, ids=str)
@pytest.mark.parametrize(
    "policy",
    [
        TokenPolicy(context_size=8),
        TokenPolicy(context_size=8, begin_batch=PUT_IN, separator=PUT_IN),
        TokenPolicy(context_size=64, begin_batch=PUT_IN, begin_sequence=PUT_IN),
        TokenPolicy(context_size=8, one_document=True),
    ],
    ids=["plain", "separated", "long", "one document"],
)
def test_every_token_is_packed_once(policy: TokenPolicy, meshes: tuple[int, ...]) -> None:
    """Documents that were half packed, and contexts that were half filled, included; every state goes on."""
    taken: list[Any] = []

    def take(number: int, streams: list[ContextStream]) -> bool:
        taken.append(contexts := streams[number].take(1))
        fresh = stream_of((number, len(streams)), policy=policy)
        fresh.load_state_dict(json.loads(json.dumps(streams[number].state_dict())))
        streams[number] = fresh
        return bool(len(contexts))

    streams = [stream_of((number, meshes[0]), policy=policy) for number in range(meshes[0])]
    for processes in meshes[1:]:
        for number in range(len(streams)):
            for _ in range(3 + 2 * number):
                take(number, streams)
        streams = of_next(streams, processes, policy=policy)
    for number in range(len(streams)):
        while take(number, streams):
            pass
    taken = [contexts for contexts in taken if len(contexts)]
    if policy.one_document:
        assert tokens_of(taken) == Counter(pair for pair in TOKENS if pair[1] < 8 and LENGTHS[pair[0]] >= 8)
        assert sum(stream.left_out for stream in streams) == sum(length < 8 for length in LENGTHS)
        assert sum(stream.cut for stream in streams) == sum(length > 8 for length in LENGTHS)
        return
    left = [waiting(stream.state_dict()["packer"]) for stream in streams]
    assert sum([tokens_of(taken), *left], Counter()) == TOKENS


def test_what_others_had_in_hand_is_told_from_what_it_joins() -> None:
    """One process of two goes on: between the rest of one document and that of another is a separator."""
    text, policy = [[1] * 10, [2] * 11, [3] * 4], TokenPolicy(context_size=8, separator=9)
    both = [stream_of((number, 2), text=text, policy=policy) for number in range(2)]
    for stream in both:
        stream.take(1)
    (one,) = of_next(both, 1, text=text, policy=policy)
    assert one.take(9).tokens.tolist() == [[1, 1, 9, 2, 2, 2, 9, 3]]
    assert waiting(one.state_dict()["packer"]) == {(2, 3): 3}


def test_a_document_that_is_gone_is_told() -> None:
    both = [stream_of((number, 2), text=[[1] * 20] * 3) for number in range(2)]
    for stream in both:
        stream.take(1)
    with pytest.raises(DataError, match="document 1 of the dataset, which was being read, is gone; restore the data"):
        of_next(both, 2, text=[[1] * 20, None, [1] * 20, [1]])[1].take(1)


def test_nothing_need_be_left_for_a_reader() -> None:
    """And then it goes on with the next reading, or has none, instead of saying that the text is empty."""
    for repeat in (True, False):
        options: dict[str, Any] = {"text": [[1], [2], [3]], "policy": TokenPolicy(context_size=1), "repeat": repeat}
        alone = stream_of(**options)
        alone.take(3)
        first, second = of_next([alone], 2, **options)
        assert first.take(4).tokens.ravel().tolist() == ([1, 3, 1, 3] if repeat else [])
        assert second.take(2).tokens.ravel().tolist() == ([2, 2] if repeat else [])


@pytest.mark.parametrize("change", [{"dealt": [[[0, -1]]]}, {"dealt": [[]]}, {"dealt": [[[0, 1]], [[0, 1]]]}], ids=str)
def test_places_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    alone = stream_of()
    alone.take(1)
    (state,) = [stream_of((0, 2)).taken_over([alone.state_dict()])]
    with pytest.raises(ValueError, match="a saved"):
        stream_of((0, 2)).load_state_dict({**state, **change})


# ---- rows


def buffer(capacity: int = 40, seed: int = 0) -> ShuffleBuffer:
    generator = torch.Generator().manual_seed(seed)
    return ShuffleBuffer(
        {SITE: 1}, capacity, generator=generator, dtypes={SITE: torch.float32}, device="cpu"
    )  # fmt: skip


def rows(first: int, last: int) -> Batch:
    numbers = torch.arange(first, last)
    return Batch({SITE: numbers[:, None].float()}, tokens=numbers, documents=numbers + 1, positions=numbers + 2)


def numbers_of(state: Any) -> list[int]:
    return state["rows"][SITE.name].ravel().int().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("before", "now"), [(1, 3), (4, 2), (3, 1), (2, 2)])
def test_rows_that_nobody_has_served_are_shared_out(before: int, now: int, tmp_path: Path) -> None:
    states = []
    for number in range(before):
        full = buffer(seed=number)
        full.add(rows(40 * number, 40 * number + 40 - 3 * number))
        full.shuffle()
        full.take(5)
        write_state(tmp_path, str(number), full.state_dict())
        states.append(read_state(tmp_path, str(number), mapped=True))
    wanted = sorted(number for state in states for number in numbers_of(state))
    found = [buffer_handed_over(states, number, now) for number in range(now)]
    assert sorted(number for state in found for number in numbers_of(state)) == wanted
    lengths = [len(state["origins"]) for state in found]
    assert max(lengths) - min(lengths) <= 1
    for state in found:
        assert state["origins"].tolist() == [[number, number + 1, number + 2] for number in numbers_of(state)]
        assert numbers_of(state) != sorted(numbers_of(state))
        one = buffer()
        one.load_state_dict(state)
        assert (one.filled, one.waiting) == (min(len(state["origins"]), 40), max(len(state["origins"]) - 40, 0))


def test_rows_beyond_the_buffer_come_in_as_others_leave() -> None:
    """Before any that are new; a state in between goes on the same."""
    state = {"rows": {SITE.name: torch.arange(95.0)[:, None]}, "origins": torch.arange(95)[:, None].repeat(1, 3),
             "waiting": 0, "beyond": 55, "capacity": 40, "generator": torch.Generator().get_state()}  # fmt: skip
    full, other = buffer(), buffer(seed=3)
    full.load_state_dict(state)
    served: list[int] = []
    assert (full.filled, full.free, full.waiting) == (40, 0, 55)
    for left in (35, 15, 0):
        batch = full.take(20)
        served += batch.activations[SITE].ravel().int().tolist()
        assert torch.equal(batch.activations[SITE].ravel().long(), batch.tokens)
        assert full.free == 0 if left else full.free == 5
        full.shuffle()
        assert (full.filled, full.waiting) == (40 if left else 35, left)
        other.load_state_dict(full.state_dict())
        assert ("beyond" in full.state_dict()) == bool(left)
        full, other = other, full
    full.add(rows(95, 100))
    full.shuffle()
    served += full.take(40).activations[SITE].ravel().int().tolist()
    assert sorted(served) == list(range(100))


# ---- the live source


def live(number: int, of: int, *, prefetch: bool, recipe: bool = False) -> Any:
    stream = StreamContext(
        backend=FakeBackend(), sites=[SITE], batch_size=24, seed=3, repeat=False, process=number, processes=of,
        open_contexts=stream_of, open_own=lambda: stream_of((number, of)),
        keeps_recipe=recipe,
    )  # fmt: skip
    config = LiveConfig(store_batch_size_prompts=4, n_batches_in_buffer=4, prefetch=prefetch)
    return saekit.default_manager().build("activation_sources", config, stream=stream)


@pytest.mark.parametrize(("prefetch", "recipe"), [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("meshes", [(1, 2), (2, 1), (4, 2), (2, 4, 1), (4, 1, 3)], ids=str)
def test_every_row_is_served_once(meshes: tuple[int, ...], prefetch: bool, recipe: bool, tmp_path: Path) -> None:
    """Whichever process had it in its buffer, in a context, in a document, or had not come to it.

    With recipes in the place of rows, too, of which each process computes again what goes to it.
    """
    batches: list[Batch] = []
    options: dict[str, Any] = {"prefetch": prefetch, "recipe": recipe}
    sources = [live(number, meshes[0], **options) for number in range(meshes[0])]
    for turn, processes in enumerate(meshes[1:]):
        for source in sources:
            batches += [next(source) for _ in range(7)]
            write_state(tmp_path, f"{turn}-{len(batches)}", source.state_dict())
            source.close()
        names = sorted({path.stem for path in tmp_path.glob(f"{turn}-*.json")}, key=lambda name: int(name[2:]))
        assert len(names) == len(sources)
        states = [read_state(tmp_path, name, mapped=True) for name in names]
        assert all(("recipe" in state["buffer"]) == recipe for state in states)
        sources = [live(number, processes, **options) for number in range(processes)]
        for source in sources:
            source.load_states(states)
    left: Counter[tuple[int, int]] = Counter()
    for number, source in enumerate(sources):
        batches += source
        ended = live(number, len(sources), prefetch=False, recipe=recipe)
        ended.load_state_dict(source.state_dict())
        assert not list(ended)
        left += waiting(ended.state_dict()["contexts"]["contexts"]["packer"])
        source.close()
    served: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        assert batch.documents is not None
        assert batch.tokens is not None
        served.update(zip(batch.documents.tolist(), batch.tokens.tolist(), strict=True))
    assert served + left == TOKENS


@pytest.mark.parametrize("recipe", [False, True], ids=["rows", "recipe"])
def test_a_state_after_taking_over_goes_on_the_same(recipe: bool, tmp_path: Path) -> None:
    """With rows that have no room in the buffer yet: three processes have become one."""
    before = [live(number, 3, prefetch=False, recipe=recipe) for number in range(3)]
    for source in before:
        next(source)
    one, again = live(0, 1, prefetch=True, recipe=recipe), live(0, 1, prefetch=False, recipe=recipe)
    one.load_states([source.state_dict() for source in before])
    assert one.state_dict()["buffer"]["beyond"] > 100
    for steps in range(12):
        write_state(tmp_path, str(steps), one.state_dict())
        again.load_state_dict(read_state(tmp_path, str(steps)))
        for batch in [next(again) for _ in range(2)]:
            expected = batch
        if steps == 11:
            assert "beyond" not in one.state_dict()["buffer"]
        next(one)
        ours = next(one)
        assert torch.equal(ours.activations[SITE], expected.activations[SITE])
    one.close()
