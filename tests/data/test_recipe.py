"""A recipe in the place of a buffer's rows: the very same rows come out, and what is not the same is found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from saekit_plugins.sources.live import LiveConfig
from support.recipes import Mixing
from support.unwaited import Watch, WouldWaitError
from torch import Tensor

import saekit
from saekit import Site
from saekit.abilities import KeepsRecipe
from saekit.data import ActivationStream, ContextStream, ShuffleBuffer, StreamContext, TokenPolicy
from saekit.data.documents import Masked
from saekit.data.recipe import ForwardInput, MadeBatch, row_sums, with_rows
from saekit.errors import DataError
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice

SITE = Site(hook_name="blocks.0.hook_resid_post")
HEAD = Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)
SIZE = 8
DOCUMENTS = [[(7 * n + t) % 120 + 1 for t in range(10 + n % 13)] for n in range(60)]


def source(backend: FakeBackend, *, recipe: bool = True, told: list[str] | None = None, **given: Any) -> Any:
    masked = [Masked(torch.tensor(ids).numpy(), torch.tensor([t % 3 > 0 for t in ids]).numpy()) for ids in DOCUMENTS]
    masks = given.pop("masks", False)

    def contexts() -> ContextStream:
        documents: Any = masked if masks else DOCUMENTS
        policy = TokenPolicy(context_size=SIZE, begin_batch=0)
        return ContextStream(documents, list, policy, d_vocab=128, repeat=True, masked=masks)

    stream = StreamContext(
        backend=backend, sites=given.pop("sites", [SITE]), batch_size=24, seed=3, open_contexts=contexts,
        choice=given.pop("choice", None), masked=masks, keeps_recipe=recipe,
        say=[].append if told is None else told.append,
    )  # fmt: skip
    options = {"store_batch_size_prompts": 4, "n_batches_in_buffer": 8, "prefetch": False, **given}
    return saekit.default_manager().build("activation_sources", LiveConfig(**options), stream=stream)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"prefetch": True},
    "two sites, one of a head": {"sites": [SITE, HEAD]},
    "other numbers": {"dtype": "bfloat16"},
    "a mask": {"masks": True},
    "special tokens and places": {"choice": TokenChoice(exclude=frozenset({0, 9}), seqpos_slice=(None, -1))},
}


@pytest.mark.parametrize("taken", [0, 1, 3, 11, 40])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_the_very_same_rows(case: str, taken: int) -> None:
    whole, told = source(Mixing(), recipe=False, **CASES[case]), list[str]()
    before, after = source(Mixing(), **CASES[case]), source(Mixing(), told=told, **CASES[case])
    for _ in range(taken):
        next(before)
        next(whole)
    state, rows = before.state_dict(), whole.state_dict()
    assert all(not len(held) for held in state["buffer"]["rows"].values()), "no row is in it"
    assert not len(state["buffer"]["origins"])
    after.load_state_dict(state)
    assert len(told) == (taken > 0)
    again = after.state_dict()["buffer"]
    for name in ("tokens", "sums", "contexts", "positions"):
        assert torch.equal(again["recipe"][name], state["buffer"]["recipe"][name])
    kept = source(Mixing(), recipe=False, **CASES[case])
    kept.load_state_dict(state)
    for name, held in rows["buffer"]["rows"].items():
        assert torch.equal(kept.state_dict()["buffer"]["rows"][name], held), "and where rows are kept from then on"
    assert torch.equal(kept.state_dict()["buffer"]["origins"], rows["buffer"]["origins"])
    for _ in range(20):
        one, other = next(whole), next(after)
        for site, held in one.activations.items():
            assert torch.equal(held, other.activations[site])
        for name in ("tokens", "documents", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    for each in (whole, before, after, kept):
        each.close()


def test_rows_of_a_checkpoint_that_has_them_stay_rows() -> None:
    """Until they are served; what is computed from then on has a recipe."""
    whole, mixed, last = source(Mixing(), recipe=False), source(Mixing()), source(Mixing())
    for _ in range(5):
        next(whole)
    mixed.load_state_dict(whole.state_dict())
    held = [len(mixed.state_dict()["buffer"]["origins"])]
    for _ in range(12):
        next(whole)
        next(mixed)
        held.append(len(mixed.state_dict()["buffer"]["origins"]))
    assert held[0] > held[-1] > 0
    assert len(mixed.state_dict()["buffer"]["recipe"]["contexts"]) > held[-1]
    last.load_state_dict(mixed.state_dict())
    for _ in range(20):
        assert torch.equal(next(whole).activations[SITE], next(last).activations[SITE])


def test_only_forwards_of_which_a_row_is_left_are_kept() -> None:
    live = source(Mixing())
    sizes = []
    for _ in range(150):
        next(live)
        recipe = live.state_dict()["buffer"]["recipe"]
        left = recipe["contexts"].unique()
        firsts = torch.tensor([4 * number for number in range(len(recipe["forwards"]))])
        assert all(((left >= first) & (left < first + 4)).any() for first in firsts)
        sizes.append(len(firsts))
    stated_bytes, stated = live.recipe_size()
    assert stated / 1.5 < max(sizes[50:]) < stated * 1.5
    held = [value for value in (*recipe.values(), *recipe["documents"].values()) if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in held) < stated_bytes
    assert isinstance(live, KeepsRecipe)


def test_a_forward_that_was_run_in_halves_is_run_in_halves_again() -> None:
    """Also where there is memory enough by now; and where there is less, the rows are compared all the same."""
    backend, fresh = Mixing(most=3), Mixing()
    live, other = source(backend), source(fresh)
    with pytest.warns(RuntimeWarning, match="ran out of memory on 4 contexts"):
        next(live)
    state = live.state_dict()
    assert state["buffer"]["recipe"]["forwards"][0] == [2, 2]
    other.load_state_dict(state)
    assert (2, SIZE) in fresh.forwards
    assert (4, SIZE) not in fresh.forwards
    assert torch.equal(next(live).activations[SITE], next(other).activations[SITE])
    short = Mixing(most=1)
    with (
        pytest.raises(DataError, match="do not come out as they did"),
        pytest.warns(RuntimeWarning, match="out of mem"),
    ):
        source(short).load_state_dict(state)


def test_another_model_is_found_and_what_changed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    live, other = source(Mixing()), Mixing(factor=1.00001)
    next(live)
    state = live.state_dict()
    words = (
        r"^of 232 activations that waited in the buffer, 232 are of forwards that do not come out as they did, bit for "
        r"bit: torch and matmul precision and device and threads are the same, so the model or the code that runs it "
        r"is another$"
    )
    with pytest.raises(DataError, match=words):
        source(other).load_state_dict(state)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(DataError, match=r"bit for bit: threads was \d+ and is 77$"):
        source(other).load_state_dict(state)
    source(Mixing()).load_state_dict(state)  # the same bits, so it is no matter


BROKEN: dict[str, tuple[Any, str]] = {
    "contexts": (lambda old: old + 10**6, "recipe of the saved buffer is not as saekit writes it"),
    "positions": (lambda old: old + SIZE, "recipe of the saved buffer is not as saekit writes it"),
    "forwards": (lambda old: [[0], *old], "recipe of the saved buffer is not as saekit writes it"),
    "sums": (lambda old: old[1:], "recipe of the saved buffer is not as saekit writes it"),
    "tokens": (lambda old: old + 10**6, "tokens of the saved buffer are not of the model's vocabulary"),
    "documents": (lambda old: old | {"starts": old["starts"].flip(0)}, "documents of the saved buffer"),
    "twice": (None, "recipe of the saved buffer has a row twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_was_never_written_so_is_refused(name: str) -> None:
    live = source(Mixing())
    next(live)
    state = live.state_dict()
    recipe, (change, words) = dict(state["buffer"]["recipe"]), BROKEN[name]
    if change is None:
        for part in ("contexts", "positions"):
            recipe[part] = recipe[part].clone()
            recipe[part][0] = recipe[part][1]
    else:
        recipe[name] = change(recipe[name])
    with pytest.raises(ValueError, match=words):
        source(Mixing()).load_state_dict(state | {"buffer": state["buffer"] | {"recipe": recipe}})


def test_a_buffer_is_not_filled_from_a_recipe_alone() -> None:
    live = source(Mixing())
    next(live)
    buffer = ShuffleBuffer({SITE: 8}, 256, generator=torch.Generator(), dtypes={SITE: torch.float32}, device="cpu")
    with pytest.raises(ValueError, match="recipe in the place of rows: saekit.data.recipe.with_rows makes them"):
        buffer.load_state_dict(live.state_dict()["buffer"])


# ---- packed and unpacked


@st.composite
def forwards(draw: st.DrawFn) -> tuple[list[MadeBatch], list[int]]:
    """Forwards of any sizes, of which some tokens count, and how many rows are taken after each."""
    size, made = draw(st.integers(1, 4)), []
    for _ in range(draw(st.integers(0, 5))):
        sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
        n = sum(sizes) * size
        kept = draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=8).map(sorted))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        tokens = torch.randint(50_000, (sum(sizes), size), generator=generator)
        runs = torch.randint(draw(st.integers(1, 3)), (sum(sizes), size), generator=generator)
        documents = draw(st.sampled_from([0, 5, 2**62])) + runs
        forward, places = ForwardInput(tokens.to(torch.int32), documents, sizes), torch.tensor(kept)
        rows = {SITE: values(forward, places)}
        made.append(
            MadeBatch(rows, tokens=tokens.flatten()[places], documents=documents.flatten()[places],
                      positions=places % size, forward=forward, places=places, sums=row_sums(rows))
        )  # fmt: skip
    return made, draw(st.lists(st.integers(0, 12), min_size=len(made), max_size=len(made)))


def values(forward: ForwardInput, places: Tensor) -> Tensor:
    """Rows that are of their forward and place alone."""
    return torch.stack(
        [forward.tokens.flatten()[places].float(), places.float(), forward.tokens.sum().expand(len(places))], 1
    )


@given(forwards())
def test_what_is_packed_comes_out(drawn: tuple[Sequence[MadeBatch], Sequence[int]]) -> None:
    """In the same order, with the same origins; in a second buffer it is packed in the same way."""
    made, taken = drawn
    capacity = sum(map(len, made)) + 1

    def buffer(*, recipes: bool) -> ShuffleBuffer:
        generator, dtypes = torch.Generator().manual_seed(1), {SITE: torch.float32}
        return ShuffleBuffer({SITE: 3}, capacity, generator=generator, dtypes=dtypes, device="cpu", recipes=recipes)

    plain, packed, second = buffer(recipes=False), buffer(recipes=True), buffer(recipes=True)
    for batch, n in zip(made, taken, strict=True):
        for one in (plain, packed):
            one.add(batch)
            one.shuffle()
            one.take(n)
    state = packed.state_dict()
    asked: list[ForwardInput] = []

    def make(forward: ForwardInput, kept: Tensor) -> Mapping[Site, Tensor]:
        asked.append(forward)
        return {SITE: values(forward, kept.flatten().nonzero()[:, 0])}

    found, differing = with_rows(state, make)
    wanted = plain.state_dict()
    assert not differing
    assert torch.equal(found["rows"][SITE.name], wanted["rows"][SITE.name])
    assert torch.equal(found["origins"], wanted["origins"])
    inputs = iter([batch.forward for batch in made])
    for again in asked:  # in the order in which they were made
        assert any(
            torch.equal(one.tokens, again.tokens) and torch.equal(one.documents, again.documents)
            and one.sizes == again.sizes for one in inputs
        )  # fmt: skip
    second.load_state_dict(found)
    twice = second.state_dict()["recipe"]
    for name in ("tokens", "sums", "contexts", "positions"):
        assert torch.equal(twice[name], state["recipe"][name])
    assert twice["forwards"] == state["recipe"]["forwards"]


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.data())
def test_one_bit_changes_a_checksum(width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, 3)), data.draw(st.integers(0, width - 1))
    one_bit_changes_a_checksum(width, dtype, row, column, data.draw(st.integers(0, 8 * dtype.itemsize - 2)))


@pytest.mark.parametrize("bit", [12, 13, 14])
def test_a_high_bit_of_a_word_tells_sites_apart(bit: int) -> None:
    """Two odd numbers differ by an even one, so times the highest bits it is nothing modulo 2^64."""
    for row, column in itertools.product(range(4), (3, 7)):
        one_bit_changes_a_checksum(8, torch.bfloat16, row, column, bit)


def one_bit_changes_a_checksum(width: int, dtype: torch.dtype, row: int, column: int, bit: int) -> None:
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    other = rows.clone()
    words = other.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    words[row, column] ^= 1 << bit
    shifted = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows)  # elsewhere in memory
    assert torch.equal(row_sums({SITE: rows}), row_sums({SITE: shifted}))
    assert (row_sums({SITE: rows}) != row_sums({SITE: other})).tolist() == [number == row for number in range(4)]
    assert row_sums({SITE: rows, HEAD: other})[row] != row_sums({SITE: other, HEAD: rows})[row]


# ---- on a device that nobody waits for


def test_rows_and_checksums_of_a_forward_wait_for_nothing() -> None:
    size, n = 8, 3
    buffer = ShuffleBuffer(
        {SITE: 4, HEAD: 2}, 2 * n, generator=torch.Generator(), device="meta", recipes=True,
        dtypes={SITE: torch.float32, HEAD: torch.float32},
    )  # fmt: skip
    forward = ForwardInput(torch.zeros(1, size, dtype=torch.int32), torch.zeros(1, size, dtype=torch.long), (1,))
    for _ in range(2):
        rows = {site: torch.zeros(n, d, device="meta") for site, d in ((SITE, 4), (HEAD, 2))}
        with Watch():
            sums = row_sums(rows)
            buffer.add(MadeBatch(rows, forward=forward, places=torch.arange(n), sums=sums))
        buffer.shuffle()  # of numbers that are on the CPU


@pytest.mark.parametrize("held", ["as they are", torch.bfloat16])
def test_activations_go_from_a_cpu_to_a_buffer_without_waiting(held: Any) -> None:
    stream = object.__new__(ActivationStream)
    stream._device, stream._dtype = "meta", None if held == "as they are" else held
    with Watch() as watch:
        kept = stream._kept(torch.ones(5, 3), own=True)
    assert (kept.device.type, kept.dtype, watch.sent) == ("meta", stream._dtype or torch.float32, 1)


def test_a_forward_on_a_device_waits_where_it_is_rounded_to_float16_alone() -> None:
    """To see whether the numbers fit."""
    stream = object.__new__(ActivationStream)
    stream._device = None
    for held, made in itertools.product((None, torch.bfloat16, torch.float16), (torch.float32, torch.float16)):
        stream._dtype = held
        waits = (held, made) == (torch.float16, torch.float32)
        with Watch(), pytest.raises(WouldWaitError) if waits else nullcontext():
            stream._kept(torch.ones(5, 3, dtype=made, device="meta"), own=True)
