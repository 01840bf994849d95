"""The mathematics in float64, against definitions written here from SPEC, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.maths import D_IN, D_SAE, N, batch, random_sae, step_input
from torch import Tensor

from saekit import SAE
from saekit.data.normalize import activation_scale
from saekit.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("way")


def activation_of(name: str, pre: float) -> float:
    return max(pre, 0.0) if name == "relu" else math.tanh(max(pre, 0.0))


def loss_by_definition(sae: SAE, x: Tensor, step: int, dead: list[int]) -> float:
    """SPEC §5, in plain Python numbers."""
    c = sae.config
    W_enc, b_enc, W_dec, b_dec = (t.tolist() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    rows = x.tolist()
    mean = [sum(row[d] for row in rows) / N for d in range(D_IN)]
    lam = c.l1_coefficient * (min(1, step / c.l1_warm_up_steps) if c.l1_warm_up_steps else 1)
    norms = [math.sqrt(sum(v * v for v in row)) for row in W_dec]
    total = 0.0
    for row in rows:
        centered = [row[d] - b_dec[d] if c.apply_b_dec_to_input else row[d] for d in range(D_IN)]
        pre = [sum(centered[d] * W_enc[d][j] for d in range(D_IN)) + b_enc[j] for j in range(D_SAE)]
        f = [activation_of(c.activation, p) for p in pre]
        out = [sum(f[j] * W_dec[j][d] for j in range(D_SAE)) + b_dec[d] for d in range(D_IN)]
        scale = 1.0
        if c.mse_loss_normalization == "dense_batch":
            scale = 1 / (math.sqrt(sum((row[d] - mean[d]) ** 2 for d in range(D_IN))) + 1e-6)
        errors = [(out[d] - row[d]) ** 2 * scale for d in range(D_IN)]
        weights = norms if c.scale_sparsity_penalty_by_decoder_norm else [1.0] * D_SAE
        penalty = sum((f[j] * weights[j]) ** c.lp_norm for j in range(D_SAE)) ** (1 / c.lp_norm)
        total += sum(errors) + lam * penalty
        if c.use_ghost_grads and dead:
            residual = [row[d] - out[d] for d in range(D_IN)]
            g = [sum(math.exp(pre[j]) * W_dec[j][d] for j in dead) for d in range(D_IN)]
            size = math.sqrt(sum(v * v for v in residual)) / (1e-6 + 2 * math.sqrt(sum(v * v for v in g)))
            ghost_errors = [(g[d] * size - residual[d]) ** 2 for d in range(D_IN)]
            total += sum(e * errors[d] / (e + 1e-6) for d, e in enumerate(ghost_errors))
    return total / N


CASES = [
    {},
    {"apply_b_dec_to_input": False},
    {"activation": "tanh-relu"},
    {"l1_coefficient": 0.0},
    {"lp_norm": 2.0},
    {"lp_norm": 0.5, "scale_sparsity_penalty_by_decoder_norm": True},
    {"mse_loss_normalization": "dense_batch"},
    {"l1_warm_up_steps": 10, "scale_sparsity_penalty_by_decoder_norm": True},
    {"use_ghost_grads": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_is_its_definition(options: dict, device: str) -> None:
    sae, x, dead = random_sae(device=device, **{"activation": "relu", **options}), batch(device=device), [1, 4]
    found = sae.losses(x, step_input(sae, dead=dead))
    assert found.loss.item() == pytest.approx(loss_by_definition(sae, x, 3, dead), rel=1e-12)


@pytest.mark.parametrize("options", [case for case in CASES if not case.get("use_ghost_grads")], ids=str)
def test_gradients_are_finite_differences(options: dict, device: str) -> None:
    sae, x = random_sae(device=device, **options), batch(device=device)
    sae.training_step(x, step_input(sae))
    for parameter in sae.parameters():
        gradient = parameter.grad.clone()
        drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        direction = drawn.to(device)
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            values.append(sae.losses(x, step_input(sae)).loss.item())
            parameter.data -= sign * 1e-6 * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


def test_ghost_gradients_reach_dead_features_only_through_their_residual(device: str) -> None:
    """The scale and the ratio are detached, so compare with differences of the loss with both held fixed."""
    sae, x, dead = random_sae(device=device, use_ghost_grads=True, l1_coefficient=0.0), batch(device=device), [2, 7]
    plain = random_sae(device=device, l1_coefficient=0.0)
    sae.training_step(x, step_input(sae, dead=dead))
    plain.training_step(x, step_input(plain))
    gradient = sae.W_dec.grad - plain.W_dec.grad
    with torch.no_grad():
        pre = sae.pre_activations(x)
        out = sae(x)
        residual = x - out
        g = pre[:, dead].exp() @ sae.W_dec[dead]
        scale = residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))
        ratio = residual.pow(2) / ((g * scale - residual).pow(2) + 1e-6)

        def ghost(decoder: Tensor) -> float:
            return (((pre[:, dead].exp() @ decoder * scale - residual).pow(2)) * ratio).sum(1).mean().item()

        for row, feature in enumerate(dead):
            nudged = sae.W_dec[dead].clone()
            nudged[row, 3] += 1e-6
            difference = (ghost(nudged) - ghost(sae.W_dec[dead])) / 1e-6
            assert gradient[feature, 3].item() == pytest.approx(difference, rel=1e-4)
    alive = [j for j in range(D_SAE) if j not in dead]
    assert gradient[alive].abs().max() < 1e-12
    nobody = sae.losses(x, step_input(sae, dead=[])).losses["ghost_grad_loss"]
    assert nobody.item() == 0.0


def test_noise_only_when_asked_and_from_its_own_generator() -> None:
    x = batch()
    silent, noisy = random_sae(), random_sae(noise_scale=0.3)
    one, two = step_input(silent), step_input(noisy)
    state = one.generator.get_state()
    silent.losses(x, one)
    assert torch.equal(one.generator.get_state(), state), "noise_scale 0 draws nothing"
    found = noisy.losses(x, two)
    noise = torch.randn(N, D_SAE, generator=torch.Generator().manual_seed(0)).double() * 0.3
    features = (noisy.pre_activations(x) + noise).relu()
    assert torch.allclose(found.output, features @ noisy.W_dec + noisy.b_dec)
    assert torch.equal(noisy(x), noisy(x)), "and none at inference"


def test_the_projection_takes_out_exactly_what_a_unit_decoder_cannot_follow(device: str) -> None:
    sae, x = random_sae(device=device, normalize_sae_decoder=True), batch(device=device)
    sae.after_update()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones_like(sae.b_enc))
    sae.training_step(x, step_input(sae))
    before = sae.W_dec.grad.clone()
    sae.before_update()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    removed = before - sae.W_dec.grad
    assert torch.allclose(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)


def test_hooks_and_the_error_term() -> None:
    sae, x = random_sae(), batch().reshape(3, 3, D_IN)
    seen: list[str] = []
    names = ["input", "acts_pre", "acts_post", "recons", "error", "output"]
    handles = [
        sae.get_submodule(f"hook_sae_{name}").add_hook(lambda tensor, hook: seen.append(hook.name)) for name in names
    ]
    assert torch.allclose(sae(x), (sae.pre_activations(x).relu() @ sae.W_dec + sae.b_dec))
    assert seen == [f"hook_sae_{name}" for name in names if name != "error"]
    sae.use_error_term = True
    seen.clear()
    assert torch.allclose(sae(x), x), "with the error added, the output is the input"
    assert seen == [f"hook_sae_{name}" for name in names]
    for handle in handles:
        handle.remove()

    def ablate(features: Tensor, hook: object) -> Tensor:
        return torch.cat([torch.zeros_like(features[..., :1]), features[..., 1:]], dim=-1)

    removed = sae.encode(x)[..., :1] * sae.W_dec[0]
    sae.hook_sae_acts_post.add_hook(ablate)
    assert torch.allclose(sae(x), x - removed), "an intervention changes exactly what it touched"


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3), st.sampled_from([{}, {"apply_b_dec_to_input": False}]))
def test_folded_is_unfolded(scale: float, options: dict) -> None:
    sae, folded, x = random_sae(**options), random_sae(**options), batch()
    folded.fold_activation_scale(scale)
    assert torch.allclose(folded(x), sae(x * scale) / scale, rtol=1e-9)
    assert torch.allclose(folded.encode(x), sae.encode(x * scale), rtol=1e-9)


def test_the_activation_scale() -> None:
    x = batch() * 37
    assert (x * activation_scale(x)).norm(dim=1).mean().item() == pytest.approx(math.sqrt(D_IN))
    with pytest.raises(DataError, match="mean norm of 0.0, so they cannot be normalized"):
        activation_scale(torch.zeros(3, 2))


def test_heads_are_flattened_inside() -> None:
    sae = random_sae()
    z = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    assert sae(z).shape == z.shape
    assert torch.allclose(sae(z), sae(z.flatten(-2)).reshape(z.shape))
    assert sae(z.float()).dtype == torch.float32
    sae.use_error_term = True
    assert torch.allclose(sae(z), z)
    with pytest.raises(ConfigError, match=r"the SAE takes \[..., 6\] or \[..., head, d_head\].*found \[2, 5\]"):
        sae(torch.zeros(2, 5, dtype=torch.float64))
