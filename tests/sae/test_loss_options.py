"""Every mix of the loss's options and its gradients, against SPEC §5 in NumPy."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import pytest
import torch
from support.maths import D_SAE, N, batch, draw, random_sae, step_input

from saekit import SAE

pytestmark = pytest.mark.usefixtures("way")


def in_numpy(sae: SAE) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy().copy() for name, value in sae.named_parameters()}


def noise_of(sae: SAE) -> np.ndarray:
    """What ``step_input``'s generator gives, times the scale."""
    device = sae.W_enc.device
    drawn = torch.randn(N, D_SAE, generator=torch.Generator(device).manual_seed(0), device=device)
    return drawn.double().cpu().numpy() * sae.config.noise_scale


def pre_in_numpy(sae: SAE, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return (x - p["b_dec"] if sae.config.apply_b_dec_to_input else x) @ p["W_enc"] + p["b_enc"]


@attrs.define
class InNumpy:
    """The loss and its terms; ``held`` is what has no gradient: residual, ghosts' scale and the ratio of errors."""

    mse: float
    l1: float
    ghost: float
    loss: float
    output: np.ndarray
    features: np.ndarray
    held: tuple[np.ndarray, ...]


def spec_loss(
    sae: SAE, p: dict[str, np.ndarray], x: np.ndarray, step: int, dead: list[int], held: tuple[np.ndarray, ...] = ()
) -> InNumpy:
    c = sae.config
    pre = pre_in_numpy(sae, p, x)
    f = np.maximum(pre + noise_of(sae), 0)
    f = np.tanh(f) if c.activation == "tanh-relu" else f
    out = (f * p["scaling_factor"] if "scaling_factor" in p else f) @ p["W_dec"] + p["b_dec"]

    def items(found: np.ndarray, target: np.ndarray) -> np.ndarray:
        squares = (found - target) ** 2
        if c.mse_loss_normalization == "none":
            return squares
        return squares / (np.sqrt(((target - target.mean(0)) ** 2).sum(1)) + 1e-6)[:, None]

    errors = items(out, x)
    weights = np.sqrt((p["W_dec"] ** 2).sum(1)) if c.scale_sparsity_penalty_by_decoder_norm else np.ones(D_SAE)
    l1 = float(np.mean([((row * weights) ** c.lp_norm).sum() ** (1 / c.lp_norm) for row in f]))
    coefficient = c.l1_coefficient * (min(1, step / c.l1_warm_up_steps) if c.l1_warm_up_steps else 1)
    ghost = 0.0
    if c.use_ghost_grads and dead:
        g = np.exp(pre[:, dead]) @ p["W_dec"][dead]
        if not held:
            residual = x - out
            scale = np.sqrt((residual**2).sum(1)) / (1e-6 + 2 * np.sqrt((g**2).sum(1)))
            held = (residual, scale, errors / (items(g * scale[:, None], residual) + 1e-6))
        residual, scale, ratio = held
        ghost = float((items(g * scale[:, None], residual) * ratio).sum(1).mean())
    mse = float(errors.sum(1).mean())
    return InNumpy(mse, l1, ghost, mse + coefficient * l1 + ghost, out, f, held)


def away_from_kinks(factor: bool, device: str, **options: object) -> SAE:
    """The first of the random SAEs with no pre-activation near 0, where differences say nothing of gradients."""
    sae, x = random_sae(device=device, **options), batch().numpy()
    noise = noise_of(sae)
    for seed in itertools.count():
        draw(sae, seed)
        if np.abs(pre_in_numpy(sae, in_numpy(sae), x) + noise).min() > 0.02:
            break
    if factor:
        sae.add_scaling_factor()
        generator = torch.Generator().manual_seed(seed)
        sae.scaling_factor.data += (torch.rand(D_SAE, generator=generator, dtype=torch.float64) - 0.3).to(device)
    return sae


def assert_gradients(sae: SAE, x: np.ndarray, step: int, dead: list[int], held: tuple[np.ndarray, ...]) -> None:
    """Along two random directions of every parameter, central differences of :func:`spec_loss`."""
    drawn, h = np.random.default_rng(7), 1e-6
    for name, parameter in sae.named_parameters():
        for _ in range(2):
            direction = drawn.standard_normal(parameter.shape)
            ends = []
            for sign in (1, -1):
                p = in_numpy(sae)
                p[name] += sign * h * direction
                ends.append(spec_loss(sae, p, x, step, dead, held).loss)
            found = float((parameter.grad.cpu().numpy() * direction).sum())
            assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("activation", ["relu", "tanh-relu"])
def test_every_mix_of_options_and_its_gradients(activation: str, p: float, normalization: str, device: str) -> None:
    x, off_on = batch(device=device), (False, True)
    for number, (apply, weigh, ghosts, noise, factor) in enumerate(itertools.product(*[off_on] * 5)):
        sae = away_from_kinks(
            factor, device, activation=activation, lp_norm=p, mse_loss_normalization=normalization,
            apply_b_dec_to_input=apply, scale_sparsity_penalty_by_decoder_norm=weigh, use_ghost_grads=ghosts,
            noise_scale=0.3 if noise else 0.0, l1_coefficient=0.7, l1_warm_up_steps=10 if number % 3 else 0,
        )  # fmt: skip
        step, dead = (0, 3, 10, 40)[number // 5 % 4], ([], [6], [1, 4, 13])[number % 5 % 3]
        expected = spec_loss(sae, in_numpy(sae), x.cpu().numpy(), step, dead)
        result = sae.training_step(x, step_input(sae, step, dead))
        found = {name: value.item() for name, value in result.losses.items()}
        assert found == pytest.approx(
            {"mse_loss": expected.mse, "l1_loss": expected.l1, "ghost_grad_loss": expected.ghost}, rel=1e-12
        )
        assert (found["ghost_grad_loss"] > 0) == (ghosts and bool(dead))
        assert result.loss.item() == pytest.approx(expected.loss, rel=1e-12)
        assert result.output.cpu().numpy() == pytest.approx(expected.output, rel=1e-12, abs=1e-12)
        assert not result.output.requires_grad
        assert result.fired.tolist() == (expected.features > 0).sum(0).tolist()
        assert_gradients(sae, x.cpu().numpy(), step, dead, expected.held)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
def test_rows_on_which_nothing_fires_have_a_gradient_too(p: float, device: str) -> None:
    """A norm of nothing but zeros has none of its own, and must not make the others nan."""
    sae, x = random_sae(device=device, lp_norm=p, scale_sparsity_penalty_by_decoder_norm=True), batch(device=device)
    sae.b_enc.data[0] -= sae.pre_activations(x)[:, 0].median().detach()  # fires on half of the rows
    sae.b_enc.data[1:] -= 100
    sae.training_step(x, step_input(sae))
    fires = sae.encode(x) > 0
    assert 0 < fires.sum() < N
    assert not fires[:, 1:].any()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in sae.parameters())
    sae.b_enc.data[0] -= 100
    sae.zero_grad()
    sae.training_step(x, step_input(sae))
    assert torch.allclose(sae.b_dec.grad, 2 * (sae.b_dec - x).mean(0))
    assert not any(parameter.grad.any() for parameter in (sae.W_enc, sae.W_dec, sae.b_enc))


def test_lambda_at_every_step_of_its_warm_up() -> None:
    for warm_up, lam in itertools.product((0, 1, 7), (0.0, 0.3, 5)):
        sae = random_sae(l1_coefficient=lam, l1_warm_up_steps=warm_up)
        for step in range(12):
            found = sae.losses(batch(), step_input(sae, step))
            expected = lam * min(1, step / warm_up) if warm_up else lam
            assert dict(found.coefficients) == {"l1_coefficient": expected}
            assert found.loss.item() == pytest.approx(
                (found.losses["mse_loss"] + expected * found.losses["l1_loss"]).item(), rel=1e-14
            )
