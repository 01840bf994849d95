"""Transcoders: what sae-lens computes, one step beside the other, finite differences, folders."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import JumpReLUTranscoderConfig, TopKTranscoderConfig, TranscoderConfig
from safetensors.torch import load_file, save_file
from support.kernels import seeded
from support.saved import READER, sae_lens_python
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import SAEConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.evals import variance_metrics
from saekit.kernels import SparseFeatures, Workspace
from saekit.sae.build import build_module, initialize
from saekit.values import Ports, StepInput

FIXTURES = Path(__file__).parents[1] / "fixtures"
PORTS = Ports({"read": 12}, {"written": 7})
D_SAE = 40


def built(config: SAEConfig, ports: Ports = PORTS, bias: float = 0.0) -> SAE:
    plugins = saekit.default_manager()
    sae = build_module(plugins.find("sae_architectures", config), config, ports, plugins)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(1)) / 2)
        sae.b_enc += bias
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae


def rows(n: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    draws = seeded(seed)
    return tuple(torch.randn(n, d, dtype=torch.float64, generator=draws) for d in (12, 7))  # type: ignore[return-value]


def gradients(sae: SAE, x: Tensor, step: StepInput, way: str) -> tuple[Any, dict[str, Tensor]]:
    sae.kernels = way
    assert sae.why_reference() == (None if way == "fast" else 'kernels is "reference"')
    result = sae.training_step(x, step)
    found = {name: value.grad for name, value in sae.named_parameters() if value.grad is not None}
    for value in sae.parameters():
        value.grad = None
    return result, found


KINDS: list[SAEConfig] = [
    kind(d_sae=D_SAE, dtype="float64", skip_connection=skip, **options)
    for kind, options in (
        (TranscoderConfig, {"l1_coefficient": 0.3, "l1_warm_up_steps": 10}),
        (TranscoderConfig, {"l1_coefficient": 0.3, "lp_norm": 2.0, "activation": "saekit:tanh-relu",
                            "normalize_sae_decoder": True, "scale_sparsity_penalty_by_decoder_norm": False,
                            "decoder_heuristic_init": False}),
        (JumpReLUTranscoderConfig, {"bandwidth": 0.3, "l0_coefficient": 0.2}),
        (JumpReLUTranscoderConfig, {"bandwidth": 0.3, "sparsity_loss": "tanh", "pre_act_loss_coefficient": 0.1}),
        (TopKTranscoderConfig, {"k": 5}),
    )
    for skip in (False, True)
]  # fmt: skip


# ---- the mathematics


@pytest.mark.parametrize("bias", [-2.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{type(config).__name__}{config.skip_connection}")
def test_the_fast_step_is_that_of_autograd(config: SAEConfig, bias: float) -> None:
    sae, (x, y) = built(config, bias=bias), rows(90)
    with torch.no_grad():
        kinds = {type(group) for _, group in sae.step_kernels[0].groups(sae, x, Workspace())}
    assert kinds == {SparseFeatures} or (not bias and not isinstance(config, TopKTranscoderConfig))
    step = StepInput(step=4, generator=seeded(), dead=torch.arange(D_SAE) % 4 == 0, target=y)
    (result, found), (expected, wanted) = (gradients(sae, x, step, way) for way in ("fast", "reference"))
    assert found.keys() == wanted.keys() == dict(sae.named_parameters()).keys()
    for key, value in found.items():
        assert (value - wanted[key]).abs().max() <= 1e-9 * wanted[key].abs().max(), key
    assert torch.allclose(result.output, expected.output, rtol=1e-9)
    assert torch.allclose(result.output, sae(x), rtol=1e-9)
    assert torch.allclose(result.loss, expected.loss, rtol=1e-9)
    assert result.losses["mse_loss"].item() == pytest.approx((sae(x) - y).pow(2).sum(1).mean().item())


@pytest.mark.parametrize("config", [
    TranscoderConfig(d_sae=D_SAE, dtype="float64", l1_coefficient=0.3, skip_connection=True),
    TranscoderConfig(d_sae=D_SAE, dtype="float64", mse_loss_normalization="dense_batch", lp_norm=2.0),
    JumpReLUTranscoderConfig(d_sae=D_SAE, dtype="float64", bandwidth=1e-9, sparsity_loss="tanh",
                             skip_connection=True, aux_loss_coefficient=0),
    TopKTranscoderConfig(d_sae=D_SAE, dtype="float64", k=5, skip_connection=True, aux_loss_coefficient=0),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_finite_differences(way: str, config: SAEConfig) -> None:
    sae, (x, y) = built(config), rows(20)
    step = StepInput(step=4, generator=seeded(), target=y)
    _, found = gradients(sae, x, step, way)
    draws = seeded(8)
    for name, value in sae.named_parameters():
        direction = torch.randn(value.shape, dtype=torch.float64, generator=draws)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * 1e-7 * direction
                values.append(sae.losses(x, step).loss.item())
                value -= sign * 1e-7 * direction
        slope = (values[0] - values[1]) / 2e-7
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("config", KINDS[-4:], ids=lambda config: f"{type(config).__name__}{config.skip_connection}")
def test_a_step_that_the_kernel_leaves_to_autograd(monkeypatch: pytest.MonkeyPatch, config: SAEConfig) -> None:
    """As on a device that would be waited for, when features are dead."""
    sae, (x, y) = built(config, bias=-2.0), rows(90)
    step = StepInput(step=4, generator=seeded(), dead=torch.arange(D_SAE) % 4 == 0, target=y)
    expected, wanted = gradients(sae, x, step, "reference")
    monkeypatch.setattr(type(sae.step_kernels[0]), "leaves", lambda *asked: True)
    monkeypatch.setattr(type(sae.step_kernels[0]), "step", None)
    result, found = gradients(sae, x, step, "fast")
    assert torch.equal(result.loss, expected.loss)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_what_passes_the_features_by_is_in_forward_alone(way: str) -> None:
    """As in sae-lens."""
    sae, (x, _) = built(TranscoderConfig(d_sae=D_SAE, dtype="float64", skip_connection=True)), rows(6)
    sae.kernels = way
    features = (x @ sae.W_enc + sae.b_enc).relu()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(sae.encode(x), features)
            assert torch.allclose(sae.decode(features), features @ sae.W_dec + sae.b_dec)
            assert torch.allclose(sae(x), features @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T)
            assert sae(x.reshape(2, 3, 12)).shape == (2, 3, 7)


def test_what_evals_measure_is_what_forward_gives() -> None:
    sae, (x, y) = built(TranscoderConfig(d_sae=D_SAE, dtype="float64", skip_connection=True)), rows(60)
    left = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    found = variance_metrics(sae, [(x[:40], y[:40]), (x[40:], y[40:])])
    assert found["explained_variance"] == pytest.approx(1 - left.item())


def test_each_side_has_its_scale() -> None:
    for config in KINDS:
        sae, (x, _) = built(config), rows(9)
        expected = sae(x * 3).detach() / 5
        sae.fold_activation_scale(3.0, 5.0)
        assert torch.allclose(sae(x), expected), config


def test_the_start() -> None:
    """Targets are far from zero, so ``b_dec`` begins at their mean; ``W_skip`` at zero."""
    sae, (x, y) = built(TranscoderConfig(d_sae=D_SAE, dtype="float64", skip_connection=True)), rows(50)
    initialize(sae, seeded(), x, target=y + 10)
    assert torch.allclose(sae.b_dec, y.mean(0) + 10)
    assert not sae.W_skip.any()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1, dtype=torch.float64))


def test_options_that_do_not_fit() -> None:
    for kind in (TranscoderConfig, JumpReLUTranscoderConfig, TopKTranscoderConfig):
        with pytest.raises(ConfigError, match="apply_b_dec_to_input: is not for transcoders, whose b_dec belongs"):
            kind(apply_b_dec_to_input=True)
    with pytest.raises(ConfigError, match="mse_loss_normalization: is not for transcoders with a skip_connection"):
        TranscoderConfig(skip_connection=True, mse_loss_normalization="dense_batch")
    with pytest.raises(ConfigError, match="init_encoder_as_decoder_transpose: needs targets as wide as inputs"):
        initialize(built(TranscoderConfig(d_sae=D_SAE, init_encoder_as_decoder_transpose=True)), seeded())


# ---- folders

PEERS = {
    "transcoder": ("saekit:transcoder", False),
    "skip_transcoder": ("saekit:transcoder", True),
    "jumprelu_transcoder": ("saekit:jumprelu_transcoder", False),
    "jumprelu_skip_transcoder": ("saekit:jumprelu_transcoder", True),
}


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", PEERS)
def test_what_the_peer_computes(tmp_path: Path, name: str) -> None:
    expected = load_file(FIXTURES / f"sae_lens_6.54.12_{name}/expected.safetensors")
    sae = SAE.load(FIXTURES / f"sae_lens_6.54.12_{name}")
    assert (sae.info.architecture, sae.config.skip_connection) == PEERS[name]
    assert [site.hook_name for site in sae.info.sites.all] == ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"]
    assert dict(sae.ports.inputs) == {"blocks.0.ln2.hook_normalized": 16}
    assert dict(sae.ports.targets) == {"blocks.0.hook_mlp_out": expected["forward"].shape[1]}
    for loaded in (sae, SAE.load(sae.save(tmp_path / "again"))):
        with torch.no_grad():
            close(loaded.encode(expected["x"]), expected["encode"])
            close(loaded.decode(expected["encode"]), expected["decode"])
            close(loaded(expected["x"]), expected["forward"])
        assert (loaded.ports, loaded.info.sites) == (sae.ports, sae.info.sites)


@pytest.mark.parametrize(("change", "message"), [
    ({"d_out": None}, "d_out in cfg.json in .* is None, expected a whole number above 0"),
    ({"d_out": True}, "d_out in cfg.json in .* is True, expected a whole number above 0"),
    ({"d_out": 9}, r"W_dec has shape \[64, 24\], expected \[64, 9\]"),
    ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input in cfg.json in .* is true or missing, and no transcoder"),
    ({"architecture": "jumprelu_transcoder"}, "says 'jumprelu_transcoder', but the weights .* hold no threshold"),
    ({"architecture": "skip_transcoder"}, "W_skip is missing"),
])  # fmt: skip
def test_folders_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(FIXTURES / "sae_lens_6.54.12_transcoder", tmp_path / "copy")
    config = json.loads((folder / "cfg.json").read_text()) | change
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(SAEFormatError, match=message):
        SAE.load(folder)


def test_one_scale_says_nothing_of_two_sides(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "sae_lens_6.54.12_transcoder", tmp_path / "copy")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "expected_average_only_in"}))
    x = load_file(folder / "expected.safetensors")["x"]
    one = (
        r"copy has one activation scale, 1\.7, and its inputs .* and targets .* are scaled each by its own: load it wi"
    )
    with pytest.raises(SAEFormatError, match=one):
        SAE.load(folder, loader={"name": "sae_lens", "activation_scale": 1.7})
    with pytest.warns(UserWarning, match=r"sae\.fold_activation_scale\(factor, target_factor\) and save it"):
        sae = SAE.load(folder)
    expected = sae(1.7 * x) / 3
    sae.fold_activation_scale(1.7, 3.0)
    close(sae(x), expected)


def at(sites: saekit.Sites, config: SAEConfig) -> SAE:
    sae = built(config, Ports.of(sites, dict.fromkeys(sites.all, 12)))
    sae.info = attrs.evolve(sae.info, sites=sites)
    return sae


READ, HEAD = saekit.Site(hook_name="read"), saekit.Site(hook_name="blocks.0.attn.hook_z", hook_head_index=1)


@pytest.mark.parametrize("target", [HEAD, READ], ids=lambda site: site.name)
def test_the_site_that_is_written_is_named_to_others(tmp_path: Path, target: saekit.Site) -> None:
    sae = at(saekit.Sites((READ,), (target,)), TranscoderConfig(d_sae=D_SAE))
    sae.save(tmp_path / "sae")
    table = json.loads((tmp_path / "sae/cfg.json").read_text())
    found = table["metadata"]["hook_name_out"], table["metadata"]["hook_head_index_out"]
    assert (table["architecture"], table["d_out"], *found) == (
        "transcoder", 12, target.hook_name, target.hook_head_index
    )  # fmt: skip
    read = SAE.load(tmp_path / "sae", loader="sae_lens")
    assert (read.info.sites, read.ports) == (sae.info.sites, sae.ports)


ELSEWHERE = saekit.Sites((READ,), (HEAD,)), saekit.Sites((READ, HEAD))


@pytest.mark.parametrize("sites", ELSEWHERE, ids=lambda sites: sites.name)
@pytest.mark.parametrize("kind", [StandardConfig, TopKConfig, BatchTopKConfig, JumpReLUConfig])
def test_an_sae_at_other_sites_than_one_has_no_name_that_others_misread(
    tmp_path: Path, kind: type, sites: saekit.Sites
) -> None:
    sae = at(sites, kind(d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae/cfg.json").read_text())["architecture"] == sae.info.architecture
    one_read = f"architecture in .* is '{sae.info.architecture}'; this loader reads"
    with pytest.raises(SAEFormatError, match=one_read):
        SAE.load(tmp_path / "sae", loader="sae_lens")
    assert SAE.load(tmp_path / "sae").ports == sae.ports


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [TranscoderConfig, JumpReLUTranscoderConfig])
def test_sae_lens_6_reads_the_folder(tmp_path: Path, kind: type, skip: bool) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    sae, x = built(kind(d_sae=D_SAE, skip_connection=skip)), rows(50)[0].float()
    sites = saekit.Sites((saekit.Site(hook_name="read"),), (saekit.Site(hook_name="written"),))
    sae.info = attrs.evolve(sae.info, sites=sites, metadata={"model_name": "gpt2-small"})
    sae.save(tmp_path / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    metadata = json.loads((tmp_path / "sae/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("read", "written")
    theirs = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(theirs["out"], sae(x), atol=1e-5)
    assert torch.allclose(theirs["features"], sae.encode(x), atol=1e-5)
