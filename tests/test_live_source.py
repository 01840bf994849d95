"""The live source: every activation once, and a saved state that goes on with the very same batches."""

from __future__ import annotations

import pytest
import torch
from saekit_plugins.live import LiveConfig

import saekit
from saekit.data import ContextStream, StreamContext, TokenPolicy
from saekit.protocols import ActivationSource
from saekit.testing import FakeBackend

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")
DOCUMENTS = [[(7 * n + t) % 120 + 1 for t in range(10 + n % 13)] for n in range(60)]


def source(repeat: bool = False, batch: int = 24, site: saekit.Site = SITE) -> ActivationSource:
    backend = FakeBackend()
    contexts = ContextStream(DOCUMENTS, list, TokenPolicy(context_size=8), d_vocab=128, repeat=repeat)
    stream = StreamContext(backend=backend, sites=[site], batch_size=batch, seed=3, open_contexts=lambda: contexts)
    config = LiveConfig(store_batch_size_prompts=4, n_batches_in_buffer=4)
    built: ActivationSource = saekit.default_manager().build("activation_sources", config, stream=stream)
    return built


def test_every_activation_is_served_once() -> None:
    live = source()
    assert isinstance(live, ActivationSource)
    batches = [batch.activations[SITE] for batch in live]
    assert all(len(batch) == 24 for batch in batches[:-1])
    served = torch.cat(batches)
    packed = ContextStream(DOCUMENTS, list, TokenPolicy(context_size=8), d_vocab=128, repeat=False).take(10**6).tokens
    expected = FakeBackend().activations(torch.from_numpy(packed), {SITE.hook_name})[SITE.hook_name].flatten(0, 1)
    assert len(served) == len(expected)
    assert torch.equal(served[served[:, 0].sort(stable=True).indices][:, 0], expected[:, 0].sort(stable=True).values)
    assert not torch.equal(served, expected), "shuffled"


def test_a_look_uses_nothing_up() -> None:
    one, two = source(), source()
    looked = one.peek()[SITE]
    assert len(looked) == 128
    assert all(torch.equal(a.activations[SITE], b.activations[SITE]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 17])
def test_a_saved_state_goes_on_with_the_very_same_batches(taken: int) -> None:
    one, two = source(repeat=True), source(repeat=True)
    for _ in range(taken):
        next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(20):
        assert torch.equal(next(one).activations[SITE], next(two).activations[SITE])
