"""``abstopk`` and ``groupmax``, which are ``topk`` with another selection; features below zero are features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.abstopk import AbsTopKConfig
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from safetensors import safe_open
from safetensors.torch import load_file
from support.ports import EARLY
from support.tiny import hooked_transformer, run_config
from torch import Tensor

import saekit
from saekit import SAE, SAEConfig
from saekit.analysis.examples import feature_peaks
from saekit.errors import ConfigError
from saekit.evals import variance_metrics
from saekit.sae.build import build_module
from saekit.testing import FakeBackend
from saekit.values import StepInput

GOLDEN = Path(__file__).parents[1] / "golden_variants/training_abstopk.safetensors"


def built(config: SAEConfig, d_in: int = 8) -> SAE:
    plugins = saekit.default_manager()
    sae: Any = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return sae  # type: ignore[no-any-return]


def abstopk(**options: Any) -> SAE:
    return built(AbsTopKConfig(**{"d_sae": 24, "k": 4, "dtype": "float64", **options}))


def rows(n: int = 30, d_in: int = 8) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ---- abstopk


def cases() -> dict[str, dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["options"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", cases())
def test_a_step_of_abstopk_is_that_of_sae_lens(name: str) -> None:
    tensors = load_file(GOLDEN)
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    options = {"aux_loss_coefficient": 1.0, "aux_loss_normalization": "none", **cases()[name]}
    sae = abstopk(**options)
    with torch.no_grad():
        for key, value in sae.named_parameters():
            value.copy_(own[key])
    step = StepInput(step=0, generator=torch.Generator(), dead=own["dead"] > 0)
    found = sae.training_step(tensors["x"], step)
    assert found.loss.item() == pytest.approx(own["loss"].item(), rel=1e-10)
    assert found.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(own["aux"].item(), rel=1e-10)
    assert (own["aux"] > 0) == (name != "none_dead")
    for key, value in sae.named_parameters():
        assert torch.allclose(value.grad, own[f"grad.{key}"], rtol=0, atol=1e-10), key
    assert torch.equal(found.fired, (sae.encode(tensors["x"]) != 0).sum(0))


def test_features_below_zero_are_features() -> None:
    sae, x = abstopk(), rows()
    features = sae.encode(x)
    assert (features < 0).any()
    assert ((features != 0).sum(1) == 4).all()
    sparse = sae.encode_sparse(x)
    assert torch.equal(sparse.dense(), features)
    values, numbers = sae.encode_topk(x, 6)
    sizes, expected = features.abs().topk(4)
    assert torch.equal(values[:, :4].abs(), sizes)
    assert torch.equal(numbers[:, :4], expected)
    assert torch.equal(values[:, :4], features.gather(1, numbers[:, :4]))
    assert (numbers[:, 4:] == -1).all()
    assert (values[:, 4:] == 0).all()
    metrics = variance_metrics(sae, [x])
    assert metrics["l0"] == 4
    assert metrics["l1"] == pytest.approx(features.abs().sum().item() / 30)
    assert metrics["never_fired"] == ((features != 0).sum(0) == 0).sum()


def test_the_strongest_contexts_are_so_by_size() -> None:
    backend, sae = FakeBackend(), abstopk(dtype="float32")
    tokens = torch.randint(1, 128, (6, 9), generator=torch.Generator().manual_seed(2))
    peaks = feature_peaks(sae, backend=backend, sites=EARLY, contexts=tokens, n=3, batch_size=2)
    features = sae.encode(backend.run(tokens, read={EARLY.hook_name}).held[EARLY.hook_name]).detach()
    features[:, 0] = 0
    assert torch.equal(peaks.fired, (features != 0).sum((0, 1)))
    assert torch.allclose(peaks.total, features.abs().sum((0, 1)))
    assert torch.allclose(peaks.values.abs(), features.abs().amax(1).topk(3, dim=0).values)
    assert (peaks.values < 0).any()
    assert torch.equal(peaks.values, features[peaks.contexts, peaks.positions, torch.arange(24)])


@pytest.mark.parametrize(
    "sae", [{"name": "abstopk", "k": 4}, {"name": "groupmax", "k": 8}, {"name": "groupmax", "k": 16}]
)
def test_they_train(tmp_path: Path, sae: dict[str, Any]) -> None:
    config = run_config(tmp_path, training={"training_tokens": 5000, "lr": 5e-3})
    config["sae"] = {"d_sae": 64, **sae}
    result = saekit.train(config, model=hooked_transformer())
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["losses/mse_loss"] for line in metrics if "losses/mse_loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    loaded = SAE.load(result.folder)
    assert loaded.info.architecture == f"saekit:{sae['name']}"
    assert loaded.log_sparsity is not None
    if sae["name"] == "abstopk":
        assert (10**loaded.log_sparsity).sum() == pytest.approx(4, rel=1e-3), "each row fires 4 times"


# ---- groupmax


@pytest.mark.parametrize("config", [GroupMaxConfig(d_sae=24, k=6), AbsTopKConfig(d_sae=24, k=6)])
def test_training_chooses_as_inference_does(config: SAEConfig) -> None:
    sae, x = built(attrs.evolve(config, dtype="float64")), rows()
    found = sae.training_step(x, StepInput(step=0, generator=torch.Generator()))
    assert torch.equal(found.fired, (sae.encode(x) != 0).sum(0))
    assert torch.allclose(found.output, sae(x))


@pytest.mark.parametrize("rescale", [False, True])
def test_one_feature_of_each_group(tmp_path: Path, rescale: bool) -> None:
    config = GroupMaxConfig(d_sae=24, k=6, dtype="float64", rescale_acts_by_decoder_norm=rescale)
    sae, x = built(config), rows()
    pre = sae.pre_activations(x) * (sae.decoder_norms() if rescale else 1)
    grouped = pre.reshape(30, 6, 4)
    expected = torch.where(grouped == grouped.amax(-1, keepdim=True), grouped, 0).relu().reshape(30, 24)
    for one in (sae, SAE.load(sae.save(tmp_path / "sae"))):
        assert torch.allclose(one.encode(x), expected)
    assert json.loads((tmp_path / "sae/cfg.json").read_text())["architecture"] == "saekit:groupmax"


def test_groups_must_be_of_one_size() -> None:
    with pytest.raises(ConfigError, match=r"sae.k: is 7, and 24 features are not so many groups of one size; choose"):
        built(GroupMaxConfig(d_sae=24, k=7))


@pytest.mark.parametrize("config", [AbsTopKConfig(d_sae=24, k=4), GroupMaxConfig(d_sae=24, k=4)])
def test_another_activation_is_refused(config: SAEConfig) -> None:
    with pytest.raises(ConfigError, match="sae.activation: is not ReLU, and (abstopk|groupmax) is defined by the"):
        built(attrs.evolve(config, activation="saekit:tanh-relu"))
