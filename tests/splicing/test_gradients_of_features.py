"""Gradients at inner points, against finite differences in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.follow import blocks_of
from support.saes import at, drawn_sae
from support.spliced import KINDS, TOKENS, place
from torch import Tensor

import saekit

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


def in_float64(kind: str) -> tuple[Any, str, int]:
    there = place(kind)
    if there.model is None:
        return there.backend, there.early, there.width
    model = copy.deepcopy(there.model).double().requires_grad_(False)
    if hasattr(model, "cfg"):
        model.cfg.dtype = torch.float64
    return model, there.early, there.width


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
@pytest.mark.parametrize("kind", ["HookedTransformer", "AutoModelForCausalLM", "HookedMamba"])
def test_gradients_are_those_of_finite_differences(kind: str, learns: bool) -> None:
    model, hook, width = in_float64(kind)
    sae = at(drawn_sae(width).double(), hook).requires_grad_(learns)
    tokens, step = TOKENS[:1, :5], 1e-6
    generator = torch.Generator().manual_seed(0)
    with torch.set_grad_enabled(False), saekit.splice(model, sae, use_error_term=True) as spliced:  # as in a notebook
        names = [f"{hook}.hook_sae_{point}" for point in POINTS]
        forward = spliced.run(tokens, read=names, want="loss", grad=True)
        ones = torch.ones_like(forward.loss)
        found = torch.autograd.grad(forward.loss, [forward.held[name] for name in names], ones)
        forward = spliced.run(tokens, read=names, want="loss", grad=True)
        forward.loss.backward(ones)
        for name, gradient in zip(names, found, strict=True):
            value = forward.held[name]
            direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)

            def loss(by: float, name: str = name, direction: Tensor = direction) -> float:
                moved = {name: lambda x: x + by * direction}
                return spliced.run(tokens, replace=moved, want="loss").loss.sum().item()

            measured = (loss(step) - loss(-step)) / (2 * step)
            assert measured == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7), name
            torch.testing.assert_close(value.grad, gradient)
    assert abs(measured) > 1e-3
    assert not any(value.grad is not None for value in model.parameters())


def test_attribution_patching_is_exact_where_the_model_is_linear_in_features() -> None:
    there = place("fake")
    sae = at(drawn_sae(8), there.early)
    name = f"{there.early}.hook_sae_acts_post"
    with saekit.splice(there.backend, sae, use_error_term=True) as spliced:
        forward = spliced.run(TOKENS, read=[name], want="logits", grad=True)
        metric = forward.logits[:, -1, 7].sum()
        (gradient,) = torch.autograd.grad(metric, forward.held[name])
        off = spliced.run(TOKENS, replace={name: torch.zeros_like}, want="logits").logits[:, -1, 7].sum()
    effect = -(gradient * forward.held[name]).sum()
    torch.testing.assert_close(effect.detach(), off - metric.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("on", [True, False], ids=["gradients", "no gradients"])
def test_attribution_patching_as_the_docs_have_it_runs_where_gradients_are_off(
    on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "splicing.md"
    (code,) = [block.text for block in blocks_of(page) if block.language == "python" and ".backward()" in block.text]
    there = place("HookedTransformer")
    sae = at(drawn_sae(16), there.early)
    with torch.set_grad_enabled(on):
        exec(code, {"torch": torch, "saekit": saekit, "model": there.backend, "sae": sae, "hook": there.early,
                    "tokens": TOKENS[:1]})  # fmt: skip
    assert "estimated" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_keeps_its_gradient_through_two_saes(kind: str) -> None:
    there = place(kind)
    saes = [at(drawn_sae(there.width, seed=1), there.early), at(drawn_sae(there.width, seed=2), there.late)]
    names = [f"{hook}.hook_sae_acts_post" for hook in (there.early, there.late)]
    with saekit.splice(there.target, saes) as spliced:
        forward = spliced.run(TOKENS, read=[*names, there.late], want="loss", grad=True)
        forward.loss.mean().backward()
        assert all(bool(forward.held[name].grad.abs().sum() > 0) for name in names)
        assert not spliced.run(TOKENS, read=names).held[names[0]].requires_grad


def test_direct_calls_keep_gradients_of_what_the_splice_reads() -> None:
    there = place("AutoModelForCausalLM")
    name = f"{there.early}.hook_sae_acts_post"
    sae = at(drawn_sae(16), there.early).requires_grad_(False)
    with saekit.splice(there.model, sae, use_error_term=True, read=[name]) as spliced:
        there.model(TOKENS).logits[:, -1, 7].sum().backward()
        direct = spliced.held[name].grad
        forward = spliced.run(TOKENS, read=[name], want="logits", grad=True)
        forward.logits[:, -1, 7].sum().backward()
        torch.testing.assert_close(direct, forward.held[name].grad)
        with torch.no_grad():
            there.model(TOKENS)
        assert not spliced.held[name].requires_grad


def test_no_gradient_reaches_what_does_not_learn() -> None:
    there = place("HookedTransformer")
    sae = at(drawn_sae(16), there.early).requires_grad_(False)
    with saekit.splice(there.model, sae) as spliced:
        loss = spliced.run(TOKENS, want="loss", grad=True).loss
    assert not loss.requires_grad
