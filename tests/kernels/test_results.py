"""Memory of dense features, and decoding them by what is known of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, random_features, seeded
from torch import Tensor

from saekit import SAE
from saekit.kernels import inference, workspace
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
    [lambda f: f, lambda f: f[5:7], lambda f: f.numpy(), lambda f: f.untyped_storage(), lambda f: f.T.detach()],
    ids=["itself", "a part", "an array", "its storage", "a view"],
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
    return torch.as_tensor(kept)


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
    features = sae.encode(rows(1))
    features.copy_(sae.encode(rows(2)))
    assert torch.allclose(sae.decode(features), plain(sae, features), atol=1e-12)
    place = features.data_ptr()
    del features
    other = sae.memory.result((ROWS, D_SAE), torch.float64, CPU)[0]
    other.copy_(random_features(ROWS, D_SAE, 0.01))
    assert other.data_ptr() == place, "or this tests nothing"
    assert torch.allclose(sae.decode(other), plain(sae, other), atol=1e-12)


def test_features_of_another_sae(sae: SAE) -> None:
    other = built(CONFIGS["standard"]).requires_grad_(False)
    other.W_dec.mul_(-1)
    other.memory = sae.memory
    features = sae.encode(rows(1))
    assert torch.allclose(other.decode(features), plain(other, features), atol=1e-12)
