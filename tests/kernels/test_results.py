"""Memory of dense features, and decoding them by what is known of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, random_features, seeded
from torch import Tensor

from saekit import SAE
from saekit.kernels import SparseFeatures, inference, workspace
from saekit.kernels.workspace import Workspace, Workspaces, uninitialized, zeros

ROWS, D_SAE = 30, 1600
CPU = torch.device("cpu")


CONFIGS = {
    "standard": StandardConfig(d_sae=D_SAE, dtype="float64"),
    "topk": TopKConfig(d_sae=D_SAE, k=7, dtype="float64"),
}


@pytest.fixture(params=list(CONFIGS))
def sae(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SAE:
    monkeypatch.setattr(workspace, "_NUMPY_FROM", 1 << 16)  # so that these features are large
    made = built(CONFIGS[request.param], bias=-5.0)
    made.memory = Workspaces()
    return made.requires_grad_(False)


def rows(seed: int, n: int = ROWS) -> Tensor:
    return torch.randn(n, 12, generator=seeded(seed), dtype=torch.float64)


def plain(sae: SAE, features: Tensor) -> Tensor:
    return sae.reconstruction(features)


# ---- where it lies


def test_large_memory_begins_at_a_line_of_the_cache() -> None:
    """Products into other memory take a quarter longer."""
    scratch, shape = Workspace(), (1100, 1024)
    made = [make(shape, torch.float32, CPU) for make in (zeros, uninitialized)]
    made += [scratch.scratch("test", shape, torch.float32, CPU), scratch.gradient_for(made[0])]
    made += [Workspaces().result(shape, torch.float32, CPU)[0]]
    assert [tensor.data_ptr() % 64 for tensor in made] == [0] * len(made)
    assert not made[0].any()


# ---- used again


def test_memory_of_features_is_used_again_and_holds_nothing_of_before(sae: SAE) -> None:
    first = sae.encode(rows(1))
    place, known = first.data_ptr(), first.clone()
    del first
    second = sae.encode(rows(2))
    assert second.data_ptr() == place
    sae.kernels = "reference"
    assert torch.allclose(second, sae.encode(rows(2)), atol=1e-12)
    assert not torch.equal(second, known)


@pytest.mark.parametrize(
    "keep",
    [
        lambda f: f,
        lambda f: f[5:7],
        lambda f: f.numpy(),
        lambda f: f.untyped_storage(),
        lambda f: f.T.detach(),
        lambda f: torch.from_dlpack(f),
        lambda f: np.from_dlpack(f),
        lambda f: memoryview(f.numpy()),
        lambda f: (f * torch.ones(1, dtype=f.dtype, requires_grad=True)).grad_fn,
    ],
    ids=[
        "itself",
        "a part",
        "an array",
        "its storage",
        "a view",
        "dlpack",
        "NumPy's dlpack",
        "a memoryview",
        "grad_fn",
    ],
)
def test_memory_that_somebody_has_is_not_used_again(sae: SAE, keep: Callable[[Tensor], Any]) -> None:
    first = sae.encode(rows(1))
    place, expected, kept = first.data_ptr(), keep(first.clone()), keep(first)
    del first
    second = sae.encode(rows(2))
    assert second.data_ptr() != place
    numbers, wanted = seen(kept), seen(expected)
    assert torch.equal(numbers, wanted)


def seen(kept: Any) -> Tensor:
    if isinstance(kept, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8).set_(kept, 0, (kept.nbytes(),))
    if hasattr(kept, "_saved_self"):  # what autograd keeps for the gradient of a factor
        kept = kept._saved_self
    return torch.as_tensor(np.asarray(kept) if isinstance(kept, memoryview) else kept)


def test_what_is_kept_is_one_block_and_no_more_than_twice_as_large() -> None:
    memory = Workspaces()

    def asked(n: int) -> tuple[int, bool]:
        tensor, empty = memory.result((n, 1024), torch.float32, CPU)
        tensor.fill_(1)
        return tensor.data_ptr(), empty

    place, empty = asked(4000)
    assert empty
    assert asked(2500) == (place, False)
    assert asked(1100)[1], "less than half"
    assert not asked(1100)[1]
    assert asked(1200)[1], "too small"
    both = [memory.result((1200, 1024), torch.float32, CPU)[0] for _ in range(2)]
    del both
    assert [memory.result((1200, 1024), torch.float32, CPU)[1] for _ in range(1)] == [False]
    memory.release()
    assert asked(1200)[1]
    copied = copy.deepcopy(memory)
    assert copied is memory


def test_memory_of_any_size_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_KEPT", 1 << 23)
    memory = Workspaces()

    def is_fresh(n: int) -> bool:
        tensor, fresh = memory.result((n, 1024), torch.float32, CPU)
        tensor.fill_(1)
        return fresh

    assert [is_fresh(2048), is_fresh(2048)] == [True, False]
    assert [is_fresh(2049), is_fresh(2049)] == [True, True]


def test_what_is_out_when_memory_is_released_is_not_kept_afterwards() -> None:
    memory = Workspaces()
    out = memory.result((2048, 1024), torch.float32, CPU)[0]
    memory.release()
    del out
    assert memory.result((2048, 1024), torch.float32, CPU)[1]


# ---- decoded by what is known


def refuse(*args: object) -> None:
    raise AssertionError("features were looked at again")


def test_what_was_encoded_is_decoded_without_looking_for_it(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    features = sae.encode(rows(1))
    monkeypatch.setattr(inference, "_sparse_if_cheaper", refuse)
    assert torch.allclose(sae.decode(features), plain(sae, features), atol=1e-12)
    assert torch.allclose(sae.decode(features.view(3, 10, D_SAE)).view(ROWS, 12), plain(sae, features), atol=1e-12)
    for other in (features.clone(), features[: ROWS - 1], features.float()):
        with pytest.raises(AssertionError, match="looked at again"):
            sae.decode(other)


def one_more(features: Tensor) -> None:
    features[3, (features[3] == 0).nonzero()[0]] = 5.0


def one_less(features: Tensor) -> None:
    features[3, features[3].argmax()] = 0.0


def moved(features: Tensor) -> None:
    one_more(features)
    one_less(features)


def by_numpy(features: Tensor) -> None:
    moved(torch.from_numpy(features.numpy()))


@pytest.mark.parametrize(
    "edit",
    [
        one_more, one_less, moved, by_numpy,
        lambda f: f.mul_(2), lambda f: f.data.mul_(2), lambda f: f[7:8].add_(1), lambda f: f.T[5].fill_(1),
        lambda f: f.zero_(), lambda f: f.fill_(1), lambda f: f[0, 0].fill_(torch.nan),
    ],
    ids=["more", "less", "moved", "numpy", "twice", "data", "a part", "a view", "zero", "dense", "none"],
)  # fmt: skip
def test_what_was_changed_is_decoded_as_it_is(sae: SAE, edit: Callable[[Tensor], Any]) -> None:
    features = sae.encode(rows(1))
    edit(features)
    expected = plain(sae, features)
    assert torch.allclose(sae.decode(features), expected, atol=1e-12, equal_nan=True)


def test_other_features_in_the_same_memory(sae: SAE) -> None:
    sae.kernels = "reference"
    others = sae.encode(rows(2)).clone()
    sae.kernels = "auto"
    features = sae.encode(rows(1))
    place: Any = features.data_ptr()
    features.copy_(others)
    assert known_at(sae) == place, "or this tests nothing"
    assert torch.allclose(sae.decode(features), plain(sae, others), atol=1e-12)
    del features
    again = sae.encode(rows(1))
    del again
    other = sae.memory.result((ROWS, D_SAE), torch.float64, CPU)[0]
    assert other.data_ptr() == place == known_at(sae), "or this tests nothing"
    other.copy_(random_features(ROWS, D_SAE, 0.01))
    assert torch.allclose(sae.decode(other), plain(sae, other), atol=1e-12)


def known_at(sae: SAE) -> Any:
    return getattr(sae.memory.known, "address", None)


def test_entries_that_are_zero_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation may make zeros of what is above zero: as many features that were set would pass for them."""
    monkeypatch.setattr(inference, "_WORTH_KEEPING", 1.0)
    memory, decoder = Workspaces(), inference.Decoder(torch.randn(40, 3, generator=seeded()))
    places, values = torch.tensor([1, 2]), torch.tensor([0.0, 5.0])
    entries = SparseFeatures(torch.zeros_like(places), places, values, 1, 40)
    features = inference.dense_features([(0, entries)], 1, 40, decoder.W_dec, memory)
    assert memory.known is not None, "or this tests nothing"
    features[0, 7] = 3.0
    torch.testing.assert_close(inference.decoded_rows(decoder, features, memory), features @ decoder.W_dec)


class Shifted:
    """Zero up to 0.3 of its own, beyond the zero of every sparse activation."""

    def __call__(self, pre: Tensor) -> Tensor:
        return torch.relu(pre - 0.3)

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.sub_(0.3).relu_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_(features > 0)


def test_what_was_set_beside_zeros_of_the_activation_is_decoded(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    sae.activation = Shifted()
    features = sae.encode(rows(1))
    assert isinstance(sae.memory.known, inference._Known)
    entries = sae.memory.known.entries
    zeros = int((entries.values == 0).sum())
    features[0, (features[0] == 0).nonzero()[:zeros, 0]] = 3.0
    assert torch.allclose(sae.decode(features), plain(sae, features), atol=1e-12)
    unchanged = sae.encode(rows(1))
    monkeypatch.setattr(inference, "_sparse_if_cheaper", refuse)
    assert torch.allclose(sae.decode(unchanged), plain(sae, unchanged), atol=1e-12)


def test_features_of_another_sae(sae: SAE) -> None:
    other = built(CONFIGS["standard"]).requires_grad_(False)
    other.W_dec.mul_(-1)
    other.memory = sae.memory
    features = sae.encode(rows(1))
    assert torch.allclose(other.decode(features), plain(other, features), atol=1e-12)
