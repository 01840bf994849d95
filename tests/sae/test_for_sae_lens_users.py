"""What users of sae-lens reach for: names, options, types, and norms in the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import saekit
from saekit import SAE, Ports, Site, Sites
from saekit.errors import ConfigError

SIZES = {"d_in": 6, "d_sae": 24}


def made(name: str, **options: Any) -> Any:
    """With rows of many norms, thresholds and biases, in float64."""
    ports = Ports({"a": 6}, {"b": 5}) if "transcoder" in name else None
    more = {"apply_b_dec_to_input": False} if ports else {}
    sae = SAE.from_dict({"name": name, **SIZES, "dtype": "float64", **more, **options}, ports=ports)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(24, 1, generator=generator, dtype=torch.float64) * 3 + 0.1)
        for name, parameter in sae.named_parameters():
            if name in ("W_dec", "threshold", "W_skip"):
                continue
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.W_dec[3] = 0
    return sae


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
FREE = {"normalize_sae_decoder": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", FREE),
        ("jumprelu", {"initial_threshold": 0.3}),
        ("gated", FREE),
        ("topk", {"k": 5}),
        ("transcoder", {"skip_connection": True} | FREE),
        ("jumprelu_transcoder", {"skip_connection": False}),
    ],
)
def test_norms_go_into_the_encoder(name: str, options: dict[str, Any]) -> None:
    sae = made(name, **options)
    norms, features, output = sae.decoder_norms().clone(), sae.encode(X), sae(X)
    sae.fold_W_dec_norm()
    kept = norms > 0
    assert torch.allclose(sae.decoder_norms()[kept], torch.ones(int(kept.sum()), dtype=torch.float64))
    assert torch.allclose(sae(X), output, rtol=1e-12, atol=1e-12)
    factor = 1 if name == "topk" else torch.where(kept, norms, 1)  # whose features are pre-activations times norms
    assert torch.allclose(sae.encode(X), features * factor, rtol=1e-12)
    assert (sae.encode(X) > 0).any()
    again = sae(X)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae(X), again), "it is folded already"


def test_factors_of_fine_tuning_stay() -> None:
    sae = made("standard", **FREE)
    sae.add_scaling_factor()
    factors = torch.linspace(0.5, 2, 24, dtype=torch.float64)
    with torch.no_grad():
        sae.scaling_factor.copy_(factors)
    output = sae(X)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae(X), output)
    assert torch.equal(sae.scaling_factor, factors)


def test_a_batchtopk_of_one_norm_keeps_its_threshold() -> None:
    sae = SAE.from_dict(
        {"name": "batchtopk", **SIZES, "k": 3, "rescale_acts_by_decoder_norm": False, "dtype": "float64"}
    )
    with torch.no_grad():
        sae.W_dec.div_(sae.decoder_norms()[:, None] / 0.2)
        sae.threshold_average.fill_(0.4)
    features, output = sae.encode(X), sae(X)
    sae.fold_W_dec_norm()
    assert torch.allclose(sae.encode(X), features * 0.2)
    assert torch.allclose(sae(X), output)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "standard",
            {"activation": "tanh-relu"} | FREE,
            "the activation function saekit:tanh-relu does not keep proportions",
        ),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}, "of a topk, whose rows have norms from 0 to"),
        ("batchtopk", {"k": 5, "rescale_acts_by_decoder_norm": False}, "features are compared by size"),
    ],
)
def test_where_it_would_be_another_sae_it_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    sae = made(name, **options)
    before = sae(X)
    with pytest.raises(ConfigError, match=message):
        sae.fold_W_dec_norm()
    assert torch.equal(sae(X), before)


@pytest.mark.parametrize("some", [True, False])
def test_of_float16_what_is_no_number_is_passed_over(some: bool) -> None:
    sae = SAE.from_dict({"name": "standard", **SIZES, **FREE}).half()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).half()
    x[3:] *= 60000  # infinite, most of them
    sae.probe_rows = x if some else x[~sae(x).isfinite().all(-1)]
    output = sae(x[:3])
    assert not sae(x[3:]).isfinite().all()
    sae.fold_W_dec_norm()
    assert torch.allclose(sae.decoder_norms().float(), torch.ones(24), atol=1e-2)
    assert torch.allclose(sae(x[:3]).float(), output.float(), rtol=0.02, atol=0.02)


def test_a_parameter_that_does_not_say_how_it_grows() -> None:
    from saekit.sae import Parameter, init
    from saekit.sae.parameters import ParameterTable

    table = ParameterTable((Parameter("odd", ("d_sae",), init=init.zeros),), {"d_sae": 3})
    with pytest.raises(ConfigError, match="what that does to odd is not stated"):
        table.grow_features(torch.nn.Module(), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_options_say_what_type_it_was_moved_to(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = SAE.from_dict({"name": "jumprelu", **SIZES})
    assert sae.cfg is sae.config
    moved = sae.to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert (moved.cfg.dtype, moved.info.options["dtype"]) == (name, name)
    assert moved.threshold.dtype == torch.promote_types(dtype, torch.float32)
    saved = "float32" if dtype == torch.float16 else name
    assert SAE.load(moved.save(tmp_path / "a")).cfg.dtype == saved
    assert moved.float().cfg.dtype == "float32"
    assert moved.to("cpu").cfg.dtype == "float32"


def test_a_name_for_plots() -> None:
    sae = SAE.from_dict({"name": "standard", **SIZES})
    assert sae.get_name() == "sae_24"
    sites = Sites.one(Site(hook_name="blocks.8.hook_resid_pre"))
    sae.info = saekit.SAEInfo(sites=sites, metadata={"model_name": "gpt2-small"})
    assert sae.get_name() == "sae_gpt2-small_blocks.8.hook_resid_pre_24"


def test_from_options_and_back(tmp_path: Path) -> None:
    sae = SAE.from_dict({"architecture": "topk", **SIZES, "k": 4})
    assert (sae.config.k, sae.d_sae, sae.info.architecture) == (4, 24, "saekit:topk")
    again = SAE.from_dict(sae.to_dict())
    assert again.config == sae.config
    assert torch.equal(again.W_enc, sae.W_enc), "the seed is the same"
    assert not torch.equal(SAE.from_dict(sae.to_dict(), seed=1).W_enc, sae.W_enc)
    assert torch.equal(sae.b_dec, torch.zeros(6))
    loaded = SAE.load(sae.save(tmp_path / "a"))
    assert torch.allclose(loaded.encode(X.float()), sae.encode(X.float()), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "ports", "transform"),
    [
        ("standard", {"inputs": {"blocks.1.hook_resid_post": 8}}, "layer_norm"),
        ("jumprelu", {"inputs": {"x": 8}}, {"name": "rms", "eps": 0.25}),
        ("transcoder", {"inputs": {"a": 8}, "targets": {"b": 4}}, None),
        ("crosscoder", {"inputs": {"b": 3, "a": 5}}, "layer_norm"),
        ("crosscoder", {"inputs": {"b": 3, "a": 5}, "targets": {"c": 5, "b": 3}}, None),
    ],
)
def test_options_say_sites_and_the_transform(name: str, ports: dict[str, Any], transform: Any) -> None:
    given = Ports(**ports)
    options = {"name": name, "d_sae": 16, "input_transform": transform, "ports": ports}
    for sae in (SAE.from_dict(options), SAE.from_dict(options, ports=given)):
        again = SAE.from_dict(json.loads(json.dumps(sae.to_dict())))
        assert (again.ports, again.info.input_transform) == (given, sae.info.input_transform)
        assert again.input_transform == sae.input_transform
        assert (again.input_transform is None) == (transform is None)
        x = torch.randn(3, 8)
        assert torch.equal(again.decode(again.encode(x), like=x), sae.decode(sae.encode(x), like=x))
        assert (transform != "layer_norm") or torch.allclose(again.encode(7 * x), again.encode(x), atol=1e-3)


@pytest.mark.parametrize(
    "ports", [3, {}, {"targets": {"a": 3}}, {"inputs": {"a": True}}, {"inputs": {"a": 3}, "outputs": {"a": 3}}]
)
def test_ports_that_are_none(ports: object) -> None:
    with pytest.raises(ConfigError, match=r"ports: is .*, expected the widths of inputs, and of targets if"):
        SAE.from_dict({"name": "standard", "d_sae": 16, "ports": ports})


def test_ports_are_said_once() -> None:
    with pytest.raises(ConfigError, match="ports: is .*, and beside the options others are given: leave one out"):
        SAE.from_dict({"name": "standard", "d_sae": 16, "ports": {"inputs": {"a": 3}}}, ports=Ports.one(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "topk", "k": 3}, "d_in: is missing: there is no model here"),
        ({"name": "topk", **SIZES, "kk": 3}, "kk"),
        ({"name": "tpk", **SIZES}, "topk"),
        (SIZES, "name"),
        ({"name": "topk", **SIZES, "hook_name": "x"}, "hook_name"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(saekit.SaekitError, match=message):
        SAE.from_dict(options)


@pytest.mark.parametrize("more", [{"metadata": {}}, {"reshape_activations": "none"}, {"hook_point": "x"}])
def test_what_an_sae_states_there_are_no_options(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"an SAE of sae-lens states about itself.*SAE\.load\(folder\) reads it"):
        SAE.from_dict({"architecture": "standard", **SIZES, "normalize_activations": "none", **more})


def test_options_of_saekit_with_one_of_theirs_are_of_saekit() -> None:
    with pytest.raises(saekit.SaekitError) as caught:
        SAE.from_dict({"name": "topk", **SIZES, "metadata": {}, "hook_name": "x"})
    assert "of sae-lens states about itself" not in str(caught.value)
