"""Processes that read one text and deal its forwards out: the batches are those of one, and each makes its part.

The processes are threads here, which meet where they tell each other something.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.threads import by_all
from torch import Tensor

import saekit
from saekit import Forward
from saekit.data import ActivationStream, ContextStream, DealtActivations, StreamContext, TokenPolicy
from saekit.distributed.group import Group
from saekit.errors import DataError
from saekit.testing import FakeBackend
from saekit.tokens import TokenChoice
from saekit.values import Batch

SITES = [saekit.Site(hook_name="blocks.0.hook_resid_post"), saekit.Site(hook_name="blocks.1.hook_resid_post")]
DOCUMENTS = [[(7 * n + t) % 120 + 1 for t in range(10 + n % 13)] for n in range(20)]
N = 4  # contexts in a forward


class Counting(FakeBackend):
    made = 0

    def run(self, tokens: Tensor, **options: Any) -> Forward:
        self.made += tokens.shape[1] == 8
        return super().run(tokens, **options)


def stream(readers: Group | None = None, *, choice: TokenChoice | None = None, repeat: bool = False) -> StreamContext:
    def contexts() -> ContextStream:
        return ContextStream(DOCUMENTS, list, TokenPolicy(context_size=8), d_vocab=128, repeat=repeat)

    return StreamContext(
        backend=Counting(), sites=SITES, batch_size=24, seed=3, open_contexts=contexts, choice=choice, readers=readers
    )


def same(found: Batch, expected: Batch) -> None:
    assert found.activations.keys() == expected.activations.keys()
    for site, rows in expected.activations.items():
        assert torch.equal(found.activations[site], rows)
        assert found.activations[site].dtype == rows.dtype
    for name in ("tokens", "documents", "positions"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


CHOICES = {"all": None, "no low ids": TokenChoice(exclude=frozenset(range(1, 40)))}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("size", [3, 4])
def test_batches_are_those_of_one_process(size: int, choice: TokenChoice | None) -> None:
    alone = stream(choice=choice)
    expected = list(ActivationStream(alone, N, dtype=torch.float64))
    backend: Any = alone.backend
    forwards = backend.made
    assert forwards % size, "the last time, some have no forward to make"
    assert len({len(batch) for batch in expected}) > 1

    def read(group: Group) -> tuple[list[Batch], int]:
        own = stream(group, choice=choice)
        batches = list(DealtActivations(own, N, dtype=torch.float64))
        counted: Any = own.backend
        return batches, counted.made

    found = by_all(size, read)
    for batches, _ in found:
        for batch, other in zip(batches, expected, strict=True):
            same(batch, other)
    assert sum(made for _, made in found) == forwards
    assert max(made for _, made in found) == -(-forwards // size)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_state_is_that_of_one_process(after: int) -> None:
    """Of the last batch that was handed out, whatever was made beside it; either goes on from it."""
    alone = ActivationStream(stream(repeat=True), N)
    for _ in range(after):
        next(alone)
    state = copy.deepcopy(alone.state_dict())

    def read(group: Group) -> tuple[dict[str, Any], list[Batch]]:
        dealt = DealtActivations(stream(group, repeat=True), N)
        for _ in range(after):
            next(dealt)
        found = copy.deepcopy(dealt.state_dict())
        dealt.load_state_dict(found)
        return found, [next(dealt) for _ in range(5)]

    ours = by_all(2, read)
    expected = [next(alone) for _ in range(5)]
    for found, batches in ours:
        assert found == state
        for batch, other in zip(batches, expected, strict=True):
            same(batch, other)
    again = ActivationStream(stream(repeat=True), N)
    again.load_state_dict(ours[0][0])
    same(next(again), expected[0])


def test_what_a_recipe_needs_is_that_of_one_process() -> None:
    def made(kind: Any, group: Group | None = None) -> list[Any]:
        own = stream(group)
        own.keeps_recipe = True
        return list(kind(own, N))

    expected = made(ActivationStream)
    for batches in by_all(3, lambda group: made(DealtActivations, group)):
        for batch, other in zip(batches, expected, strict=True):
            same(batch, other)
            assert batch.forward.sizes == other.forward.sizes != ()
            assert torch.equal(batch.forward.tokens, other.forward.tokens)
            assert torch.equal(batch.places, other.places)


def test_text_of_which_nothing_counts_ends() -> None:
    nothing = TokenChoice(exclude=frozenset(range(128)))

    def read(group: Group) -> str:
        with pytest.raises(DataError) as caught:
            next(DealtActivations(stream(group, choice=nothing, repeat=True), N))
        return str(caught.value)

    for said in by_all(2, read):
        assert said.startswith("no token of the text counts")


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_live_source_gives_the_same_batches(prefetch: bool) -> None:
    from saekit_plugins.sources.live import LiveConfig, LiveSource

    config = LiveConfig(store_batch_size_prompts=N, n_batches_in_buffer=3, prefetch=prefetch)
    alone = LiveSource(config, stream())
    expected = list(alone)
    alone.close()

    def read(group: Group) -> list[Batch]:
        source = LiveSource(config, stream(group))
        assert source.memory_bytes() > 0
        return list(source)

    for batches in by_all(2, read):
        for batch, other in zip(batches, expected, strict=True):
            same(batch, other)
