"""The mathematics in float64, against definitions written here from SPEC, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.cosine import CosineConfig
from saekit_plugins.cosine_restarts import CosineRestartsConfig
from saekit_plugins.standard import StandardConfig
from torch import Tensor

import saekit
from saekit.config import TrainingConfig
from saekit.data.normalise import activation_scale
from saekit.errors import ConfigError, DataError
from saekit.pretrained.load import build_module
from saekit.sae import SAE, StepInput, geometric_median
from saekit.sae.init import initialise
from saekit.training.schedule import ComposedSchedule

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
        centred = [row[d] - b_dec[d] if c.apply_b_dec_to_input else row[d] for d in range(D_IN)]
        pre = [sum(centred[d] * W_enc[d][j] for d in range(D_IN)) + b_enc[j] for j in range(D_SAE)]
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


def initialised(sample: Tensor | None = None, **options: object) -> SAE:
    sae = random_sae(**options)
    initialise(dict(sae.named_parameters()), sae.config, torch.Generator().manual_seed(3), sample)
    return sae


def test_initialisations() -> None:
    plain = initialised()
    bound = math.sqrt(6 / D_SAE)  # Kaiming-uniform of a [d_in, d_sae] matrix: fan_in is its second size
    assert plain.W_enc.abs().max() <= bound
    assert plain.W_enc.abs().max() > 0.8 * bound
    assert not plain.b_enc.any()
    assert not plain.b_dec.any()
    orthogonal = initialised(decoder_orthogonal_init=True)
    assert torch.allclose(orthogonal.W_dec.T @ orthogonal.W_dec, torch.eye(D_IN, dtype=torch.float64), atol=1e-6)
    heuristic = initialised(decoder_heuristic_init=True)
    assert torch.allclose(heuristic.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1, dtype=torch.float64))
    assert (heuristic.W_dec < 0).any(), "directions of both signs"
    normal = initialised(normalize_sae_decoder=True, init_encoder_as_decoder_transpose=True)
    assert torch.allclose(normal.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    assert torch.equal(normal.W_enc, normal.W_dec.T)
    normal.W_dec.data += 1
    assert not torch.equal(normal.W_enc, normal.W_dec.T), "a copy"
    x = batch() + 4
    assert torch.allclose(initialised(x, b_dec_init_method="mean").b_dec, x.mean(0))
    assert torch.allclose(initialised(x, b_dec_init_method="geometric_median").b_dec, geometric_median(x))


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    assert torch.allclose(
        geometric_median(torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]], dtype=torch.float64)),
        torch.ones(2, dtype=torch.float64),
    )
    line = torch.tensor([[0.0], [1], [2], [100], [101]], dtype=torch.float64)
    assert geometric_median(line).item() == pytest.approx(2, abs=1e-3), "in one dimension it is the median"


def rates(training: dict, schedule: object) -> list[float]:
    plugins = saekit.default_manager()
    config = TrainingConfig(**{"train_batch_size_tokens": 1, "lr": 2.0, **training})
    composed = ComposedSchedule(config, lambda steps: plugins.build("lr_schedules", schedule, lr=2.0, steps=steps))
    return [composed(step) for step in range(config.steps)]


def test_lr_schedules_at_every_step() -> None:
    N, w, D = 30, 4, 8
    shape = {"training_tokens": N, "lr_warm_up_steps": w, "lr_decay_steps": D}
    warm = [2.0 * (t + 1) / w for t in range(w)]
    main = N - w - D
    assert rates(shape, "constant") == pytest.approx(warm + [2.0] * main + [2.0 * (1 - j / D) for j in range(D)])
    cosine = [0.5 + 1.5 * (1 + math.cos(math.pi * t / main)) / 2 for t in range(main)]
    decay = [0.5 * (1 - j / D) for j in range(D)]
    assert rates(shape, CosineConfig(end=0.5)) == pytest.approx(warm + cosine + decay)
    cycle = main // 3
    restarts = [0.2 + 1.8 * (1 + math.cos(math.pi * (t % cycle) / cycle)) / 2 for t in range(main)]
    assert rates(shape, CosineRestartsConfig(n_restart_cycles=3)) == pytest.approx(
        warm + restarts + [0.2 * (1 - j / D) for j in range(D)]
    )
    assert rates({"training_tokens": 5}, "cosine")[0] == 2.0
    with pytest.raises(ConfigError, match=r"already ends at 0, so there is nothing to decay from"):
        rates(shape, CosineConfig(end=0.0))
    with pytest.raises(ConfigError, match="more than the schedule's 18 steps"):
        rates(shape, CosineRestartsConfig(n_restart_cycles=99))


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
    with pytest.raises(DataError, match="mean norm of 0.0, so they cannot be normalised"):
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
