"""Inference by the kernels is that of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, seeded
from torch import Tensor

import saekit
import saekit.kernels.encoder
import saekit.kernels.screen
from saekit import SAE
from saekit.config import SAEConfig
from saekit.values import StepInput


@pytest.fixture(params=["standard", "tanh", "topk", "batchtopk", "batchtopk without norms"])
def some_sae(request: pytest.FixtureRequest) -> SAE:
    config: SAEConfig = {
        "standard": StandardConfig(d_sae=600, normalize_sae_decoder=False),
        "tanh": StandardConfig(d_sae=600, activation="tanh-relu"),
        "topk": TopKConfig(d_sae=600, k=7),
        "batchtopk": BatchTopKConfig(d_sae=600, k=7),
        "batchtopk without norms": BatchTopKConfig(d_sae=600, k=7, rescale_acts_by_decoder_norm=False),
    }[request.param]
    sae = built(config, bias=-4.0)
    if hasattr(sae, "threshold_average"):
        sae.threshold_average.fill_(0.8)
        sae.threshold_updates.fill_(torch.inf)
    return sae


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (1500, 12), (3, 2, 6), (0, 12)], ids=str)
@pytest.mark.parametrize("factor", [False, True])
def test_inference_is_that_of_plain_torch(some_sae: SAE, shape: tuple[int, ...], factor: bool, device: str) -> None:
    sae = some_sae.to(device)
    x = (torch.randn(*shape, generator=seeded(4)) * 3).to(device)
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.copy_(torch.rand(600, generator=seeded(8)) + 0.5)
    sae.kernels = "reference"
    expected = (sae.encode(x), sae(x))
    sae.kernels = "auto"
    with torch.no_grad():
        features, output = sae.encode(x), sae(x)
        decoded = sae.decode(features, like=x)
        entries = sae.encode_sparse(x)
    assert features.shape == expected[0].shape
    assert torch.allclose(features, expected[0], atol=1e-5)
    assert torch.equal(entries.dense().reshape(features.shape), features)
    for found in (output, decoded):
        assert found.shape == x.shape
        assert torch.allclose(found, expected[1], atol=1e-4)
    if len(x):
        values, numbers = sae.encode_topk(x, 4)
        top = expected[0].topk(4, dim=-1).values
        assert values.shape == numbers.shape == (*expected[0].shape[:-1], 4)
        assert torch.allclose(values, top, atol=1e-5)
        assert torch.equal(numbers == -1, values == 0)
        assert torch.allclose(features.gather(-1, numbers.clamp_min(0))[numbers >= 0], values[numbers >= 0])


def test_gradients_go_where_they_are_asked_for(some_sae: SAE) -> None:
    x = torch.randn(9, 12, generator=seeded(4)).requires_grad_()
    some_sae(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert some_sae.W_dec.grad is not None
    assert some_sae.encode_sparse(x).values.grad_fn is None


@pytest.mark.parametrize("point", ["input", "acts_pre", "acts_post", "recons", "error", "output"])
def test_hooks_see_dense_tensors_and_change_what_follows(some_sae: SAE, point: str) -> None:
    sae, x = some_sae, torch.randn(6, 12, generator=seeded(4)) * 3
    seen: list[Tensor] = []

    def halve(tensor: Tensor, hook: Any) -> Tensor:
        assert type(tensor) is Tensor
        seen.append(tensor.clone())
        return tensor / 2

    results = {}
    for kernels in ("reference", "auto"):
        seen.clear()
        sae.kernels, sae.use_error_term = kernels, point == "error"
        handle = sae._modules[f"hook_sae_{point}"].add_hook(halve)
        with torch.no_grad():
            results[kernels] = (sae(x), sae.encode_sparse(x).dense(), [tensor.clone() for tensor in seen])
        handle.remove()
    (output, features, looked), (expected, plain, expected_looks) = results["auto"], results["reference"]
    assert torch.allclose(output, expected, atol=1e-4)
    assert torch.allclose(features, plain, atol=1e-5)
    assert len(looked) == len(expected_looks) >= 1
    for one, other in zip(looked, expected_looks, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_k_out_of_range() -> None:
    sae = built(StandardConfig(d_sae=20))
    for k in (0, 21):
        with pytest.raises(ValueError, match=f"k must be 1 to 20, the number of features; found {k}"):
            sae.encode_topk(torch.zeros(2, 12), k)


def test_no_gradient_no_autocast_no_other_type(some_sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for bfloat16 gets it: those products are not the kernels' business."""
    monkeypatch.setattr(type(some_sae.step_kernels[0]), "groups", None)
    x = torch.randn(6, 12, generator=seeded())
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            some_sae(x)
        with pytest.raises(TypeError):
            some_sae(x)
        some_sae.bfloat16()
        assert some_sae(x).dtype == torch.float32, "that of the input"


# ---- numbers that are none


@pytest.mark.parametrize("where", ["a row", "a weight", "a bias"])
@pytest.mark.parametrize("screen", [True, False])
def test_what_is_no_number_stays_so(some_sae: SAE, where: str, screen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not pass for a feature that is not active: a broken model would look well, and training go on."""
    monkeypatch.setattr(saekit.kernels.screen, "why_no_screen", lambda *args: None if screen else "as the test wants")
    x = torch.randn(700, 12, generator=seeded(4))
    with torch.no_grad():
        if where == "a row":
            x[300] = torch.nan
        elif where == "a weight":
            some_sae.W_enc[3, 5] = torch.nan
        else:
            some_sae.b_enc[5] = torch.nan
        features, output = some_sae.encode(x), some_sae(x)
    some_sae.kernels = "reference"
    with torch.no_grad():
        assert torch.equal(features.isnan().any(1), some_sae.encode(x).isnan().any(1))
        assert torch.equal(output.isnan(), some_sae(x).isnan())
    some_sae.kernels = "auto"
    result = some_sae.training_step(x, StepInput(step=0, generator=seeded()))
    assert result.loss.isnan()


def test_a_gradient_through_the_input_hook() -> None:
    sae, steer = built(StandardConfig(d_sae=60)).requires_grad_(False), torch.zeros(12, requires_grad=True)
    sae.hook_sae_input.add_hook(lambda x, hook: x + steer)
    sae(torch.randn(4, 12)).sum().backward()
    assert steer.grad is not None
    assert steer.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, when it first transforms a function
def test_transformed_functions() -> None:
    sae = built(StandardConfig(d_sae=60)).requires_grad_(False)
    x = torch.randn(4, 12)
    assert torch.allclose(torch.vmap(sae)(x), sae(x), atol=1e-5)
    assert torch.allclose(torch.func.jvp(sae, (x,), (x,))[0], sae(x), atol=1e-5)


@pytest.mark.parametrize("hooked", [False, True])
def test_one_vector(hooked: bool) -> None:
    sae, x = built(StandardConfig(d_sae=60)), torch.randn(12, generator=seeded())
    if hooked:
        sae.hook_sae_acts_post.add_hook(lambda features, hook: None)
    assert sae.encode_sparse(x).shape == (1, 60)
    values, numbers = sae.encode_topk(x, 3)
    assert values.shape == numbers.shape == (3,)
