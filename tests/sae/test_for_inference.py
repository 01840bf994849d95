"""The architectures that are for inference alone: ``matching_pursuit`` and ``temporal``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.matching_pursuit import MatchingPursuitConfig
from saekit_plugins.architectures.temporal import TemporalConfig
from saekit_plugins.evals.downstream import DownstreamConfig
from saekit_plugins.evals.downstream.module import DownstreamEval
from saekit_plugins.evals.reconstruction import ReconstructionConfig
from saekit_plugins.evals.reconstruction.module import ReconstructionEval
from support.ports import DOCUMENTS, EARLY, EMBED
from support.sweeps import manager
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import SAE, Ports, SAEConfig
from saekit.analysis.examples import feature_peaks
from saekit.errors import ConfigError
from saekit.evals import variance_metrics
from saekit.sae.build import build_module
from saekit.testing import FakeBackend
from saekit.values import StepInput

TEMPORAL: dict[str, Any] = {"n_heads": 2, "bottleneck_factor": 3, "kval_topk": 4, "input_scale": 0.5}


def built(config: SAEConfig, ports: Ports | int = 8) -> SAE:
    plugins = saekit.default_manager()
    sae: Any = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return sae  # type: ignore[no-any-return]


def pursuit(**options: Any) -> SAE:
    return built(MatchingPursuitConfig(**{"d_sae": 24, "dtype": "float64", **options}))


def temporal(**options: Any) -> SAE:
    return built(TemporalConfig(**{"d_sae": 24, "dtype": "float64", **TEMPORAL, **options}))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ---- matching pursuit


def test_orthonormal_directions_are_all_taken_once() -> None:
    """Then features are the parts of ``x̄`` along directions, those above zero, the largest first."""
    sae = pursuit(d_sae=8, residual_threshold=0.0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.linalg.qr(sae.W_dec).Q)
    x = rows(20)
    parts = ((x - sae.b_dec) @ sae.W_dec.T).relu()
    assert torch.allclose(sae.encode(x), parts)
    sae.config = attrs.evolve(sae.config, max_iterations=2)
    values, features = parts.topk(2)
    assert torch.allclose(sae.encode(x), torch.zeros_like(parts).scatter(1, features, values))


def test_a_row_ends_below_the_threshold() -> None:
    """And not before: each feature that was taken left at least that much, but for the last."""
    sae = pursuit(residual_threshold=1.2, stop_on_duplicate_support=False, max_iterations=50)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    x = rows(30)
    left = (x - sae(x)).norm(dim=1)
    assert (left < 1.2).all()
    assert len({count.item() for count in (sae.encode(x) > 0).sum(1)}) > 2


def test_pursuit_has_gradients() -> None:
    """To what is taken, not to which: by finite differences."""
    sae, x = pursuit(residual_threshold=0.4, max_iterations=4), rows(3).requires_grad_()
    weights = rows(3).flip(0)
    (sae(x) * weights).sum().backward()
    for values in (x, sae.W_dec, sae.b_dec):
        gradient, along = values.grad, torch.randn_like(values)
        found = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                values += step * along
                found.append((sae(x) * weights).sum())
                values -= step * along
        assert (found[0] - found[1]) / 2e-6 == pytest.approx((gradient * along).sum().item(), rel=1e-6)


def test_the_threshold_is_in_units_of_inputs(tmp_path: Path) -> None:
    sae, x = pursuit(residual_threshold=0.9), rows(30)
    features, output = sae.encode(3 * x), sae(3 * x)
    sae.fold_activation_scale(3.0)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config.residual_threshold == pytest.approx(0.3)
    for one in (sae, again):
        assert torch.allclose(one.encode(x), features / 3)
        assert torch.allclose(one(x), output / 3)
    with pytest.raises(ConfigError, match="scale and target_scale cannot differ"):
        sae.fold_activation_scale(2.0, 3.0)


# ---- temporal


def test_features_depend_on_the_positions_before_alone() -> None:
    sae, x = temporal(), rows(2, 6)
    changed = x.clone()
    changed[0, 3] += 1
    same = (sae.encode(x) == sae.encode(changed)).all(-1)
    assert same[0, :3].all()
    assert not same[0, 3:].any(), "each looks at those before it"
    assert same[1].all()
    assert torch.allclose(sae(x)[:, :4], sae(x[:, :4]))


def test_the_prediction_passes_features_by() -> None:
    sae, x = temporal(n_attn_layers=2), rows(2, 6)
    prediction, left = sae.predicted(x)
    s = sae.config.input_scale
    assert torch.allclose(left + prediction @ sae.W_dec, s * x - sae.b_dec)
    assert torch.allclose(sae(x), ((sae.encode(x) + prediction) @ sae.W_dec + sae.b_dec) / s)
    assert torch.allclose(sae.decode(sae.encode(x)) + prediction @ sae.W_dec / s, sae(x))
    assert ((sae.encode(x) > 0).sum(-1) <= 4).all()


def test_a_forward_predicts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x, calls = temporal(n_attn_layers=2), rows(2, 6), []
    expected = sae.decode(sae.encode(x)) + sae.bypass(x)
    real = sae.predicted
    monkeypatch.setattr(sae, "predicted", lambda given: calls.append(1) or real(given))
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert torch.equal(sae(x), expected)
    assert len(calls) == 2
    without = sae.decode(0 * sae.encode(x)) + sae.bypass(x)
    sae.hook_sae_acts_post.add_hook(lambda features, point: 0 * features)
    assert torch.equal(sae(x), without), "hooks come after it"


def test_a_scale_becomes_part_of_the_inputs_scale(tmp_path: Path) -> None:
    sae, x = temporal(), rows(2, 6)
    features, output = sae.encode(3 * x), sae(3 * x)
    sae.fold_activation_scale(3.0)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config.input_scale == 1.5
    assert torch.allclose(again.encode(x), features)
    assert torch.allclose(again(x), output / 3)
    with pytest.raises(ConfigError, match="scale and target_scale cannot differ"):
        sae.fold_activation_scale(2.0, 3.0)


@pytest.mark.parametrize("call", ["encode", "forward", "encode_sparse"])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 6)])
def test_what_is_no_sequence_is_refused(call: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"temporal reads whole sequences, .* must be \[batch, position, d_in\], found"
    ):
        getattr(temporal(), call)(rows(*shape))


def test_heads_and_features_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="d_sae: is 24, which bottleneck_factor · n_heads = 15 must divide"):
        temporal(n_heads=5)


# ---- both


@pytest.mark.parametrize("make", [pursuit, temporal])
def test_they_have_no_pre_activations(make: Any) -> None:
    sae, x = make(), rows(2, 6)
    for call in (sae.pre_activations, sae.features_of):
        with pytest.raises(ConfigError, match=r"has no pre-activations: .*; encode\(x\) gives features"):
            call(x)
    hook = sae.hook_sae_acts_pre.add_hook(lambda values, point: None)
    with pytest.raises(ConfigError, match="a hook is at hook_sae_acts_pre, and .* has no pre-activations"):
        sae.encode(x)
    hook.remove()
    seen = []
    sae.hook_sae_acts_post.add_hook(lambda values, point: seen.append(values))
    assert torch.equal(sae.encode(x), seen[0])


@pytest.mark.parametrize("config", [MatchingPursuitConfig(d_sae=24), TemporalConfig(d_sae=24, **TEMPORAL)])
def test_they_give_back_what_they_read(config: SAEConfig) -> None:
    with pytest.raises(ConfigError, match="no other targets"):
        built(attrs.evolve(config, apply_b_dec_to_input=False), Ports({"a": 8}, {"b": 8}))


@pytest.mark.parametrize("make", [pursuit, temporal])
def test_they_are_not_trained(make: Any) -> None:
    sae = make()
    with pytest.raises(ConfigError, match="is for inference alone, and cannot be trained: saekit has no training"):
        sae.training_step(rows(4), StepInput(step=0, generator=torch.Generator()))


@pytest.mark.parametrize("name", ["matching_pursuit", "temporal"])
def test_a_run_of_them_ends_before_any_model_is_loaded(tmp_path: Path, name: str) -> None:
    backend = FakeBackend()
    config = run_config(tmp_path, model={"name": "fake", "backend": "fake"}, sae={"name": name, "d_sae": 64})
    del config["sae"]["l1_coefficient"]
    with pytest.raises(ConfigError, match=r"sae.name: names an architecture that is for inference alone: .* Choose an"):
        saekit.train(config, plugins=manager(backend), dataset=DOCUMENTS)
    assert not backend.forwards
    assert not list(tmp_path.iterdir())


# ---- measured in a model


@pytest.mark.parametrize("make", [pursuit, temporal])
def test_evals_leave_sequences_whole(make: Any) -> None:
    backend, sites = FakeBackend(), saekit.Sites.one(EARLY)
    tokens = torch.randint(128, (5, 9), generator=torch.Generator().manual_seed(2))
    sae = make(dtype="float32")
    found = ReconstructionEval(ReconstructionConfig(batch_size_prompts=2))(
        sae, backend=backend, sites=sites, contexts=tokens
    )
    with torch.no_grad():
        held = backend.run(tokens, read={EARLY.hook_name}).held[EARLY.hook_name]
        output, features = sae(held), sae.encode(held)
    whole = (held - held.mean((0, 1))).pow(2).sum()
    assert found["explained_variance"] == pytest.approx(float(1 - (held - output).pow(2).sum() / whole), abs=1e-5)
    assert found["l0"] == pytest.approx(float((features > 0).sum() / 45))
    assert found["n_tokens"] == 45
    spliced = DownstreamEval(DownstreamConfig(batch_size_prompts=2))(sae, backend=backend, sites=sites, contexts=tokens)
    with torch.no_grad():
        put = backend.run(tokens, replace={EARLY.hook_name: lambda held: sae(held)}, want="loss").loss.mean()
    assert spliced["ce_loss_with_sae"] == pytest.approx(float(put))
    peaks = feature_peaks(sae, backend=backend, sites=sites, contexts=tokens, n=2, batch_size=2)
    assert torch.equal(peaks.fired, (features[:, 1:] > 0).sum((0, 1)))


def test_rows_without_their_sequences_are_not_measured() -> None:
    with pytest.raises(ConfigError, match="temporal reads whole sequences"):
        variance_metrics(temporal(), [rows(12)])
    assert variance_metrics(temporal(), [rows(2, 6)])["n_tokens"] == 12
    assert variance_metrics(pursuit(), [rows(2, 6)]) == pytest.approx(variance_metrics(pursuit(), [rows(12)]))


def test_more_sites_lie_side_by_side() -> None:
    sae = built(MatchingPursuitConfig(d_sae=24), Ports({EMBED.name: 3, EARLY.name: 5}))
    assert sae(torch.zeros(4, 8)).shape == (4, 8)
