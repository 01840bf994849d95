"""Initializations, each alone and in every mix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.maths import D_IN, D_SAE, N, batch, random_sae
from torch import Tensor

import saekit
from saekit import SAE
from saekit.errors import ConfigError
from saekit.sae import geometric_median
from saekit.sae.build import build_module, initialize

pytestmark = pytest.mark.usefixtures("way")


def initialized(sample: Tensor | None = None, **options: object) -> SAE:
    sae = random_sae(**options)
    initialize(sae, torch.Generator().manual_seed(3), sample)
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


@pytest.mark.parametrize("decoder", ["kaiming", "decoder_orthogonal_init", "decoder_heuristic_init"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_mix_of_initializations(decoder: str, transpose: bool, normalize: bool, dtype: str) -> None:
    options = {"normalize_sae_decoder": normalize, "init_encoder_as_decoder_transpose": transpose, "dtype": dtype}
    if decoder != "kaiming":
        options[decoder] = True
    if normalize and decoder == "decoder_heuristic_init":
        with pytest.raises(ConfigError, match=r"decoder_heuristic_init.*normalize_sae_decoder=false"):
            random_sae(**options)
        return
    d_in, d_sae = 24, 90
    plugins = saekit.default_manager()
    config = StandardConfig(d_sae=d_sae, **options)
    sae = build_module(plugins.find("sae_architectures", config), config, d_in, plugins)
    for parameter in sae.parameters():
        parameter.data.fill_(9)
    initialize(sae, torch.Generator().manual_seed(3))
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
        initialize(sae, torch.Generator(), sample, scale)
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
