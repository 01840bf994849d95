"""The mathematics in float64, against definitions written here from SPEC, one row at a time."""

from __future__ import annotations

import itertools
import math

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.architectures.standard import StandardConfig
from torch import Tensor

import saekit
from saekit.data.normalize import activation_scale
from saekit.errors import ConfigError, DataError
from saekit.pretrained.load import build_module
from saekit.sae import SAE, StepInput, geometric_median
from saekit.sae.init import initialize

D_IN, D_SAE, N = 6, 14, 9


def random_sae(seed: int = 0, **options: object) -> SAE:
    config = StandardConfig(**{"d_sae": D_SAE, "dtype": "float64", "normalize_sae_decoder": False, **options})  # type: ignore[arg-type]
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, D_IN, plugins)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return sae


def batch(seed: int = 5) -> Tensor:
    return torch.randn(N, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


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


def step_input(sae: SAE, step: int = 3, dead: list[int] | None = None) -> StepInput:
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[dead or []] = True
    return StepInput(step=step, generator=torch.Generator().manual_seed(0), dead=mask)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_is_its_definition(options: dict) -> None:
    sae, x, dead = random_sae(**{"activation": "relu", **options}), batch(), [1, 4]
    found = sae.losses(x, step_input(sae, dead=dead))
    assert found.loss.item() == pytest.approx(loss_by_definition(sae, x, 3, dead), rel=1e-12)


@pytest.mark.parametrize("options", [case for case in CASES if not case.get("use_ghost_grads")], ids=str)
def test_gradients_are_finite_differences(options: dict) -> None:
    sae, x = random_sae(**options), batch()
    sae.training_step(x, step_input(sae))
    for parameter in sae.parameters():
        gradient = parameter.grad.clone()
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            values.append(sae.losses(x, step_input(sae)).loss.item())
            parameter.data -= sign * 1e-6 * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7)


def test_ghost_gradients_reach_dead_features_only_through_their_residual() -> None:
    """The scale and the ratio are detached, so compare with differences of the loss with both held fixed."""
    sae, x, dead = random_sae(use_ghost_grads=True, l1_coefficient=0.0), batch(), [2, 7]
    plain = random_sae(l1_coefficient=0.0)
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


def test_the_projection_takes_out_exactly_what_a_unit_decoder_cannot_follow() -> None:
    sae, x = random_sae(normalize_sae_decoder=True), batch()
    sae.after_update()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    sae.training_step(x, step_input(sae))
    before = sae.W_dec.grad.clone()
    sae.before_update()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-12
    removed = before - sae.W_dec.grad
    assert torch.allclose(removed, (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)


def initialized(sample: Tensor | None = None, **options: object) -> SAE:
    sae = random_sae(**options)
    initialize(dict(sae.named_parameters()), sae.config, torch.Generator().manual_seed(3), sample)
    return sae


def test_initializations() -> None:
    plain = initialized(init_encoder_as_decoder_transpose=False)
    bound = math.sqrt(6 / D_SAE)  # Kaiming-uniform of a [d_in, d_sae] matrix: fan_in is its second size
    assert plain.W_enc.abs().max() <= bound
    assert plain.W_enc.abs().max() > 0.8 * bound
    assert not plain.b_enc.any()
    assert not plain.b_dec.any()
    orthogonal = initialized(decoder_orthogonal_init=True)
    assert torch.allclose(orthogonal.W_dec.T @ orthogonal.W_dec, torch.eye(D_IN, dtype=torch.float64), atol=1e-6)
    heuristic = initialized(decoder_heuristic_init=True)
    assert torch.allclose(heuristic.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1, dtype=torch.float64))
    assert (heuristic.W_dec < 0).any(), "directions of both signs"
    normal = initialized(normalize_sae_decoder=True, init_encoder_as_decoder_transpose=True)
    assert torch.allclose(normal.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    assert torch.equal(normal.W_enc, normal.W_dec.T)
    normal.W_dec.data += 1
    assert not torch.equal(normal.W_enc, normal.W_dec.T), "a copy"
    x = batch() + 4
    assert torch.allclose(initialized(x, b_dec_init_method="mean").b_dec, x.mean(0))
    assert torch.allclose(initialized(x, b_dec_init_method="geometric_median").b_dec, geometric_median(x))


def test_geometric_median_minimizes_the_sum_of_distances() -> None:
    assert torch.allclose(
        geometric_median(torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]], dtype=torch.float64)),
        torch.ones(2, dtype=torch.float64),
    )
    line = torch.tensor([[0.0], [1], [2], [100], [101]], dtype=torch.float64)
    assert geometric_median(line).item() == pytest.approx(2, abs=1e-3), "in one dimension it is the median"


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


@settings(max_examples=50, deadline=None)
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


# ---- every mix of the loss's options, against SPEC §5 in NumPy


def in_numpy(sae: SAE) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in sae.named_parameters()}


def noise_of(sae: SAE) -> np.ndarray:
    """What ``step_input``'s generator gives, times the scale."""
    drawn = torch.randn(N, D_SAE, generator=torch.Generator().manual_seed(0))
    return drawn.double().numpy() * sae.config.noise_scale


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


def away_from_kinks(factor: bool, **options: object) -> SAE:
    """The first of the random SAEs with no pre-activation near 0, where differences say nothing of gradients."""
    for seed in itertools.count():
        sae = random_sae(seed, **options)
        if factor:
            sae.add_scaling_factor()
            generator = torch.Generator().manual_seed(seed)
            sae.scaling_factor.data += torch.rand(D_SAE, generator=generator, dtype=torch.float64) - 0.3
        pre = pre_in_numpy(sae, in_numpy(sae), batch().numpy()) + noise_of(sae)
        if np.abs(pre).min() > 0.02:
            return sae
    raise AssertionError


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
            found = float((parameter.grad.numpy() * direction).sum())
            assert found == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("activation", ["relu", "tanh-relu"])
def test_every_mix_of_options_and_its_gradients(activation: str, p: float, normalization: str) -> None:
    x, off_on = batch(), (False, True)
    for number, (apply, weigh, ghosts, noise, factor) in enumerate(itertools.product(*[off_on] * 5)):
        sae = away_from_kinks(
            factor, activation=activation, lp_norm=p, mse_loss_normalization=normalization, apply_b_dec_to_input=apply,
            scale_sparsity_penalty_by_decoder_norm=weigh, use_ghost_grads=ghosts, noise_scale=0.3 if noise else 0.0,
            l1_coefficient=0.7, l1_warm_up_steps=10 if number % 3 else 0,
        )  # fmt: skip
        step, dead = (0, 3, 10, 40)[number // 5 % 4], ([], [6], [1, 4, 13])[number % 5 % 3]
        expected = spec_loss(sae, in_numpy(sae), x.numpy(), step, dead)
        result = sae.training_step(x, step_input(sae, step, dead))
        found = {name: value.item() for name, value in result.losses.items()}
        assert found == pytest.approx(
            {"mse_loss": expected.mse, "l1_loss": expected.l1, "ghost_grad_loss": expected.ghost}, rel=1e-12
        )
        assert (found["ghost_grad_loss"] > 0) == (ghosts and bool(dead))
        assert result.loss.item() == pytest.approx(expected.loss, rel=1e-12)
        assert result.output.numpy() == pytest.approx(expected.output, rel=1e-12, abs=1e-12)
        assert not result.output.requires_grad
        assert result.fired.tolist() == (expected.features > 0).sum(0).tolist()
        assert_gradients(sae, x.numpy(), step, dead, expected.held)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
def test_rows_on_which_nothing_fires_have_a_gradient_too(p: float) -> None:
    """A norm of nothing but zeros has none of its own, and must not make the others nan."""
    sae, x = random_sae(lp_norm=p, scale_sparsity_penalty_by_decoder_norm=True), batch()
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


# ---- every mix of initializations


@pytest.mark.parametrize("decoder", ["kaiming", "decoder_orthogonal_init", "decoder_heuristic_init"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_mix_of_initializations(decoder: str, transpose: bool, normalize: bool, dtype: str) -> None:
    options = {"normalize_sae_decoder": normalize, "init_encoder_as_decoder_transpose": transpose, "dtype": dtype}
    if decoder != "kaiming":
        options[decoder] = True
    if normalize and decoder == "decoder_heuristic_init":
        with pytest.raises(ConfigError, match=r"decoder_heuristic_init.*normalize_sae_decoder = false"):
            random_sae(**options)
        return
    d_in, d_sae = 24, 90
    plugins = saekit.default_manager()
    config = StandardConfig(d_sae=d_sae, **options)
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    for parameter in sae.parameters():
        parameter.data.fill_(9)
    initialize(dict(sae.named_parameters()), sae.config, torch.Generator().manual_seed(3))
    W_enc, W_dec = sae.W_enc.detach().double(), sae.W_dec.detach().double()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    norms = W_dec.norm(dim=1)
    if normalize:
        assert norms == pytest.approx(torch.ones(d_sae).double(), abs=1e-6)
    elif decoder == "decoder_heuristic_init":
        assert norms == pytest.approx(torch.full((d_sae,), 0.1).double(), abs=1e-6)
        unit = W_dec / norms[:, None]  # a Gaussian's direction: each coordinate has mean 0 and variance 1 / d
        assert abs(unit.mean()) < 3 / math.sqrt(d_in * d_in * d_sae)
        assert (unit**4).mean().item() == pytest.approx(3 / (d_in * (d_in + 2)), rel=0.15)
    elif decoder == "decoder_orthogonal_init":
        assert torch.allclose(W_dec.T @ W_dec, torch.eye(d_in).double(), atol=1e-5)
    else:
        uniform(W_dec, math.sqrt(6 / d_in))  # [d_sae, d_in]: fan_in is its second size
    if transpose:
        assert torch.equal(W_enc, W_dec.T)
        assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
        assert (sae.W_enc.is_contiguous(), sae.W_enc.T.is_contiguous()) == (dtype == "float64", dtype != "float64")
    else:
        uniform(W_enc, math.sqrt(6 / d_sae))
        assert abs(np.corrcoef(W_enc.T.flatten(), W_dec.flatten())[0, 1]) < 0.1, "drawn, not copied"


def uniform(values: Tensor, bound: float) -> None:
    assert -bound <= values.min() < -0.99 * bound
    assert 0.99 * bound < values.max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(values.mean().item()) < 4 * bound / math.sqrt(3 * values.numel())


def weiszfeld(points: np.ndarray, ftol: float = 1e-20) -> np.ndarray:
    """SPEC §5, one point at a time."""
    m = sum(points) / len(points)
    objective = sum(float(np.sqrt(((x - m) ** 2).sum())) for x in points)
    for _ in range(100):
        weights = [1 / max(float(np.sqrt(((x - m) ** 2).sum())), 1e-6) for x in points]
        m = sum(w * x for w, x in zip(weights, points, strict=True)) / sum(weights)
        before, objective = objective, sum(float(np.sqrt(((x - m) ** 2).sum())) for x in points)
        if before - objective < ftol * objective:
            break
    return m


@pytest.mark.parametrize(
    "points",
    [
        np.random.default_rng(0).standard_normal((40, 5)) * 3 + 1,
        np.random.default_rng(1).standard_cauchy((25, 3)),  # far outliers
        np.array([[0.0, 0], [0, 0], [0, 0], [9, 1], [-3, 5]]),  # the median is a point: the floor of the distance acts
    ],
    ids=["gaussian", "outliers", "a point"],
)
def test_geometric_median_is_weiszfelds(points: np.ndarray) -> None:
    found = geometric_median(torch.tensor(points)).numpy()
    assert found == pytest.approx(weiszfeld(points), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_b_dec_of_scaled_activations(dtype: str, scale: float) -> None:
    """The methods look at raw activations; the SAE sees scaled ones."""
    x = batch() + 40
    for method, expected in {
        "zeros": np.zeros(D_IN),
        "mean": x.numpy().sum(0) / N,
        "geometric_median": weiszfeld(x.numpy()),
    }.items():
        sae = random_sae(b_dec_init_method=method, dtype=dtype)
        sample = None if method == "zeros" else x
        initialize(dict(sae.named_parameters()), sae.config, torch.Generator(), sample, scale)
        assert sae.b_dec.detach().numpy() == pytest.approx(expected * scale, rel=1e-6)


def test_options_that_contradict_each_other() -> None:
    for options, words in (
        ({"decoder_heuristic_init": True, "decoder_orthogonal_init": True}, "choose one of decoder_heuristic_init"),
        (
            {"normalize_sae_decoder": True, "scale_sparsity_penalty_by_decoder_norm": True},
            "scale_sparsity_penalty_by_decoder_norm: has no effect while normalize_sae_decoder",
        ),
        ({"expansion_factor": 2}, "give d_sae or expansion_factor"),
        ({"lp_norm": 0.0}, "lp_norm: must be above 0, found 0.0"),
        ({"noise_scale": -0.1}, "noise_scale: must be 0 or more, found -0.1"),
        ({"l1_coefficient": -1.0}, "l1_coefficient: must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            random_sae(**options)
