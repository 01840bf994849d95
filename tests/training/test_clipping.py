"""Gradient clipping, against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.optimizers import adam_for
from support.training import make_trainer, rows
from torch import nn

from saekit.values import StepInput

pytestmark = pytest.mark.usefixtures("way")


@settings(max_examples=40)
@given(st.floats(1e-3, 1e3), st.sampled_from([0.0, 0.1, 1.0, 7.5]), st.sampled_from(["float32", "float64"]))
def test_clipping_is_torchs(size: float, clip: float, dtype: str) -> None:
    generator = torch.Generator().manual_seed(int(size * 1000))
    own, theirs = (
        [nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in ((4, 7), (7,), (7, 4))]
        for _ in range(2)
    )
    unused = nn.Parameter(torch.zeros(3, dtype=getattr(torch, dtype)))  # has no gradient
    named = [(str(number), parameter) for number, parameter in enumerate([*own, unused])]
    optimizer = adam_for(named, lambda step: 0.5, clip_grad_norm=clip, eps=1.0)
    adam = torch.optim.Adam(theirs, lr=0.5, betas=(0.0, 0.999), eps=1.0)
    total = 0.0
    for a, b in zip(own, theirs, strict=True):
        a.grad = (torch.randn(a.shape, generator=generator) * size).to(a)
        b.grad = a.grad.clone()
        total += a.grad.double().pow(2).sum().item()
    norm = optimizer.step(0)
    assert norm.item() == pytest.approx(math.sqrt(total), rel=1e-5), "the norm before clipping"
    if clip:
        assert nn.utils.clip_grad_norm_(theirs, clip).item() == pytest.approx(norm.item(), rel=1e-6)
    adam.step()
    for a, b in zip(own, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-12)
        assert a.grad is None, "it is freed"
    assert not unused.any()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_logged_norm_is_that_of_the_projected_gradient_before_clipping(normalize: bool) -> None:
    options = {"normalize_sae_decoder": normalize}
    first, second, third = (make_trainer(optimizer={"clip_grad_norm": clip}, **options) for clip in (1e-3, 0.0, 1e9))
    x = rows(100)
    first.sae.training_step(x, StepInput(step=0, generator=torch.Generator()))
    first.sae.before_update()
    expected = math.sqrt(sum(parameter.grad.pow(2).sum().item() for parameter in first.sae.parameters()))
    assert expected > 1
    for trainer in (second, third, first):
        trainer.sae.zero_grad(set_to_none=True)
        assert trainer.train_on(x)["details/grad_norm"] == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(second.sae.parameters(), third.sae.parameters(), strict=True))
