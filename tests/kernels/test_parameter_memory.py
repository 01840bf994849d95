"""Memory of parameters that is not as the SAE made it, and clipping inside Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.kernels import adam, built, seeded
from support.optimizers import adam_for

from saekit import SAE
from saekit.values import StepInput

# ---- memory of parameters that is not as the SAE made it


def contiguous(sae: SAE) -> None:
    sae.load_state_dict({name: value.contiguous() for name, value in sae.state_dict().items()}, assign=True)


def moved(sae: SAE) -> None:
    sae.double().float()


def new_memory(sae: SAE) -> None:
    sae.W_enc.data = sae.W_enc.data.contiguous()


@pytest.mark.parametrize("change", [contiguous, moved, new_memory, lambda sae: None], ids=lambda f: f.__name__)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_order_of_memory_does_not_change_what_is_learned(
    change: Any, late: bool, kernels: Any, device: str
) -> None:
    if late and change is contiguous:
        pytest.skip("that makes other parameters, which no optimizer knows")
    x = torch.randn(200, 12, generator=seeded(1)).to(device)
    weights = []
    for made in (lambda sae: None, change):
        sae = built(StandardConfig(d_sae=30, l1_coefficient=0.1), bias=-1.0, device=device)
        sae.kernels = kernels
        if not late:
            made(sae)
        optimizer = adam(sae)
        for step in range(6):
            if late and step == 3:
                made(sae)
            sae.training_step(x, StepInput(step=step, generator=seeded(device=device)))
            optimizer.step(step)
        weights.append({name: value.detach().clone() for name, value in sae.named_parameters()})
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-5), name


def test_a_gradient_in_another_order_of_memory(device: str) -> None:
    x, weights = torch.randn(200, 12, generator=seeded(1)).to(device), []
    for turn in (False, True):
        sae = built(StandardConfig(d_sae=30), bias=-1.0, device=device)
        optimizer = adam(sae)
        sae.training_step(x, StepInput(step=0, generator=seeded(device=device)))
        if turn:
            sae.W_enc.grad = sae.W_enc.grad.contiguous()
        optimizer.step(0)
        weights.append(sae.W_enc.detach().clone())
    assert torch.equal(weights[0], weights[1])


# ---- clipping inside Adam


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_clipping_inside_adam_is_that_of_torch(clip: float, size: float, device: str) -> None:
    """Adam's first step does not depend on the size of a gradient, but its moments do."""
    own, other = (built(StandardConfig(d_sae=30), device=device) for _ in range(2))
    optimizer = adam_for(own.named_parameters(), lambda step: 1e-3, beta1=0.9, clip_grad_norm=clip)
    plain = torch.optim.Adam(other.parameters(), lr=1e-3, betas=(0.9, 0.999))
    for step in range(3):
        for sae in (own, other):
            for number, parameter in enumerate(sae.parameters()):
                parameter.grad = torch.empty_like(parameter).copy_(
                    torch.randn(parameter.shape, generator=seeded(10 * step + number)) * size * (step + 1)
                )
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in other.parameters()])
        assert optimizer.step(step).item() == pytest.approx(norm.item(), rel=1e-5)
        if clip:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        plain.step()
    for name, parameter in other.named_parameters():
        assert torch.allclose(dict(own.named_parameters())[name], parameter, atol=1e-6), name
        moments = plain.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            found = optimizer.state_dict()[name][moment]
            rounded = 1e-12 if device == "cpu" else 1e-7 * size  # of what is near zero
            assert torch.allclose(found, moments[moment], rtol=1e-4, atol=rounded), (name, moment)
