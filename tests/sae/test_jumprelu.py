"""The architecture ``jumprelu``: beside sae-lens 6.54.12, one step beside the other, finite differences, runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.transcoder import JumpReLUTranscoderConfig
from safetensors.torch import load_file, save_file
from support.kernels import built as built_sae
from support.kernels import seeded
from support.saved import READER, sae_lens_python
from support.training import fakes, run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.errors import ConfigError
from saekit.kernels import SparseFeatures, Workspace
from saekit.sae import squared_errors
from saekit.values import StepInput

FIXTURES = Path(__file__).parents[1] / "fixtures"
D_IN, D_SAE = 12, 40


def built(d_in: int = D_IN, seed: int = 0, bias: float = 0.0, **options: Any) -> SAE:
    """Random weights, decoder rows of many norms, thresholds from 0 to 0.5."""
    config = JumpReLUConfig(**{"d_sae": D_SAE, "dtype": "float64", "bandwidth": 0.3, "ste_to_input": False, **options})
    sae = built_sae(config, d_in, seed, bias)
    with torch.no_grad():
        sae.W_dec *= 0.1 + torch.rand(sae.d_sae, 1, generator=seeded(seed + 1), dtype=torch.float64)
        sae.threshold.copy_(torch.rand(sae.d_sae, generator=seeded(seed + 2)) / 2)
    return sae


def rows(n: int, seed: int = 5, d_in: int = D_IN) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=seeded(seed))


def step_input(dead: Tensor | None = None, step: int = 0) -> StepInput:
    return StepInput(step=step, generator=seeded(), dead=dead)


def gradients(sae: SAE, x: Tensor, step: StepInput, way: str) -> tuple[Any, dict[str, Tensor]]:
    sae.kernels = way
    assert sae.why_reference() == (None if way == "fast" else 'kernels is "reference"')
    result = sae.training_step(x, step)
    found = {name: value.grad for name, value in sae.named_parameters() if value.grad is not None}
    for value in sae.parameters():
        value.grad = None
    return result, found


# ---- beside the peer


@pytest.mark.parametrize("name", ["sae_lens_5_jumprelu", "sae_lens_6_jumprelu"])
def test_loss_and_gradients_are_those_of_sae_lens(way: str, name: str) -> None:
    theirs = load_file(FIXTURES / f"losses/{name}.safetensors")
    options = json.loads((FIXTURES / f"losses/{name}.json").read_text())["options"]
    sae = built(
        d_in=16, d_sae=64, aux_loss_coefficient=0, bandwidth=options["jumprelu_bandwidth"],
        l0_coefficient=options["l0_coefficient"],
        sparsity_loss={"step": "l0", "tanh": "tanh"}[options.get("jumprelu_sparsity_loss_mode", "step")],
        pre_act_loss_coefficient=options.get("pre_act_loss_coefficient", 0.0),
        ste_to_input=options.get("jumprelu_ste_to_input", False),
    )  # fmt: skip
    with torch.no_grad():
        for key, value in sae.named_parameters():
            value.copy_(theirs[f"param.{key}"])
    result, found = gradients(sae, theirs["x"], step_input(theirs["dead"]), way)
    assert result.loss.item() == pytest.approx(theirs["loss"].item(), rel=2e-9)
    assert result.losses["mse_loss"].item() == pytest.approx(theirs["loss.mse_loss"].item(), rel=2e-9)
    weighted = {"l0_loss": 0.3 * result.losses["sparsity_loss"], "pre_act_loss": 0.01 * result.losses["pre_act_loss"]}
    for key, value in weighted.items():
        assert value.item() == pytest.approx(theirs.get(f"loss.{key}", torch.zeros(1)).item(), rel=1e-7)
    assert torch.allclose(sae.encode(theirs["x"]), theirs["features"], rtol=0, atol=1e-12)
    assert torch.allclose(result.output, theirs["recons"], rtol=0, atol=1e-12)
    assert found.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    for key, value in found.items():
        expected = theirs[f"grad.{key}"].double()
        assert (value - expected).abs().max() <= 2e-7 * expected.abs().max().clamp_min(1), key


# ---- one step beside the other

OPTIONS: list[dict[str, Any]] = [
    {"aux_loss_coefficient": 0.0},
    {"l0_warm_up_steps": 10, "ste_to_input": True},
    {"sparsity_loss": "target_l0", "target_l0": 7.0, "k_aux": 2},
    {"sparsity_loss": "target_l0", "target_l0": 7.0, "ste_to_input": True, "normalize_sae_decoder": True,
     "decoder_heuristic_init": False},
    {"sparsity_loss": "tanh", "pre_act_loss_coefficient": 0.03, "k_aux": 100},
    {"sparsity_loss": "tanh", "ste_to_input": True, "apply_b_dec_to_input": False},
    {"pre_act_loss_coefficient": 0.3, "aux_loss_coefficient": 0.0},
]  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encoder", "groups", "gradients", "auxk", "active"):
        monkeypatch.setattr(f"saekit.kernels.{module}.CHUNK", 16)
    monkeypatch.setattr("saekit_plugins.architectures.jumprelu.module._ROWS", 16)


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("bias", [-2.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_the_fast_step_is_that_of_autograd(options: dict[str, Any], bias: float, factor: bool) -> None:
    sae, x = built(bias=bias, l0_coefficient=0.4, **options), rows(90)
    with torch.no_grad():
        kinds = {type(group) for _, group in sae.step_kernels[0].groups(sae, x, Workspace())}
    assert kinds == ({SparseFeatures} if bias else {Tensor}), kinds
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.copy_(torch.rand(D_SAE, generator=seeded(3)) + 0.5)
    dead = torch.rand(D_SAE, generator=seeded(4)) < 0.3
    for mask in (None, dead, torch.zeros_like(dead)):
        (result, found), (expected, wanted) = (gradients(sae, x, step_input(mask, 4), w) for w in ("fast", "reference"))
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert (value - wanted[key]).abs().max() <= 1e-9 * wanted[key].abs().max(), key
        assert wanted["threshold"].abs().max() > 0
        assert torch.equal(result.fired, expected.fired)
        for one, other in ((result.loss, expected.loss), (result.output, expected.output),
                           *zip(result.losses.values(), expected.losses.values(), strict=True)):  # fmt: skip
            assert torch.allclose(one, other, rtol=1e-9)
        assert result.losses.keys() == expected.losses.keys()
        assert result.coefficients == expected.coefficients


@pytest.mark.parametrize("method", ["scale", "decoder", "unrotated_decoder"])
def test_fine_tuning_leaves_thresholds_alone(method: str) -> None:
    sae, x = built(), rows(40)
    sae.add_factors_for(method)
    sae.learn_only(sae.table.trained_by(method))
    (_, found), (_, wanted) = (gradients(sae, x, step_input(), way) for way in ("fast", "reference"))
    assert found.keys() == wanted.keys() <= {"scaling_factor", "W_dec", "b_dec"}
    for key, value in found.items():
        assert torch.allclose(value, wanted[key], rtol=1e-9), key


def test_what_is_close_to_a_threshold_moves_it_and_what_is_not_does_not() -> None:
    sae = built(d_in=1, d_sae=1, bandwidth=0.1, l0_coefficient=2.0, aux_loss_coefficient=0)
    with torch.no_grad():
        for value in (sae.b_enc, sae.b_dec):
            value.zero_()
        sae.W_enc.fill_(1)
        sae.W_dec.fill_(1)
        sae.threshold.fill_(0.5)
    for z, near in ((0.44, 0), (0.46, 1), (0.54, 1), (0.56, 0)):
        for way in ("fast", "reference"):
            _, found = gradients(sae, torch.tensor([[z]], dtype=torch.float64), step_input(), way)
            to_feature = 2 * ((z if z > 0.5 else 0) - z)
            expected = -near / 0.1 * (0.5 * to_feature + 2.0)
            assert found["threshold"].item() == pytest.approx(expected), (z, way)


# ---- where the loss has a slope, it is that of finite differences


@pytest.mark.parametrize("options", [{"sparsity_loss": "tanh", "pre_act_loss_coefficient": 0.5}, {}], ids=str)
def test_finite_differences(way: str, options: dict[str, Any]) -> None:
    """No pre-activation lies near its threshold: there the estimate adds nothing and the loss has a slope."""
    sae, x = built(bandwidth=1e-9, aux_loss_coefficient=0, **options), rows(20)
    sae.threshold.data.clamp_min_(0.01)
    step = step_input(torch.arange(D_SAE) < 6)
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


# ---- options


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="target_l0: is the L of sparsity_loss"):
        JumpReLUConfig(sparsity_loss="target_l0")
    with pytest.raises(ConfigError, match="target_l0: is the L of sparsity_loss"):
        JumpReLUConfig(target_l0=8.0)
    with pytest.raises(ConfigError, match="tanh_scale: is the c of sparsity_loss=tanh, and that is 'l0': leave"):
        JumpReLUConfig(tanh_scale=3.0)
    with pytest.raises(ConfigError, match="k_aux: is for AuxK, and aux_loss_coefficient is 0: leave it out"):
        JumpReLUTranscoderConfig(k_aux=8, aux_loss_coefficient=0)
    assert JumpReLUConfig(tanh_scale=4.0, aux_loss_coefficient=0).k_aux is None
    with pytest.raises(ConfigError, match="^sae.target_l0: is 200.5, but there are only [0-9]+ features\n"):
        built(sparsity_loss="target_l0", target_l0=200.5)
    words = (
        "sae.activation: is not ReLU, and jumprelu is defined by the pre-activations above thresholds themselves; leave"
    )
    with pytest.raises(ConfigError, match=words):
        built(activation="saekit:tanh-relu")


def test_thresholds_stay_at_zero_or_more() -> None:
    sae = built()
    sae.threshold.data.fill_(-0.5)
    sae.after_update()
    assert torch.equal(sae.threshold, torch.zeros(D_SAE, dtype=torch.float64))


def test_thresholds_below_0_in_a_file_are_told(tmp_path: Path) -> None:
    sae, x = with_site(built()), rows(50)
    with torch.no_grad():
        sae.threshold[:3] = torch.tensor([-0.25, -1.5, 0.0])
    folder = sae.save(tmp_path / "sae")
    words = rf"^2 of {D_SAE} thresholds in the file are below 0, the least -1.5. They are read as 0: pre-activations"
    with pytest.warns(UserWarning, match=words) as told:
        loaded = SAE.load(folder)
    assert [one.filename for one in told] == [__file__]
    assert torch.equal(loaded.threshold[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(loaded(x), sae(x)), "a feature is above zero in either"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_thresholds_keep_their_digits(dtype: str) -> None:
    sae = built(dtype=dtype)
    assert sae.threshold.dtype == torch.float32
    sae.cast_weights(torch.bfloat16)
    assert sae.threshold.dtype == torch.float32
    assert sae.to(torch.bfloat16).threshold.dtype == torch.float32
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae(rows(3)).shape == (3, D_IN)


# ---- the folder


def with_site(sae: SAE) -> SAE:
    sites = saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post"))
    sae.info = attrs.evolve(sae.info, sites=sites, metadata={"model_name": "gpt2-small"})
    return sae


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, dtype: str) -> None:
    sae, x = with_site(built(dtype=dtype)), rows(50)
    folder = sae.save(tmp_path / "sae")
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "jumprelu"
    loaded = SAE.load(folder)
    assert type(loaded) is type(sae)
    assert loaded.config == sae.config
    for name, value in sae.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value), name
    assert torch.equal(loaded(x), sae(x))
    if dtype == "float64":
        t = {name: value.double().numpy() for name, value in load_file(folder / "sae_weights.safetensors").items()}
        pre = (x.numpy() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        features = np.where(pre > t["threshold"], pre, 0)
        assert np.allclose(sae.encode(x).detach(), features)
        assert np.allclose(sae(x).detach(), features @ t["W_dec"] + t["b_dec"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sae_lens_6_reads_the_folder(tmp_path: Path, dtype: str) -> None:
    python = sae_lens_python()
    if python is None:
        pytest.skip("sae-lens 6 is not installed; name a Python that has it in SAEKIT_SAE_LENS_PYTHON")
    sae, x = with_site(built(dtype=dtype)), rows(50).to(getattr(torch, dtype))
    sae.save(tmp_path / "sae")
    save_file({"x": x}, tmp_path / "x.safetensors")
    command = [python, "-c", READER, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    atol = 1e-5 if dtype == "float32" else 0.1
    assert torch.allclose(theirs["out"].float(), sae(x).float(), atol=atol)
    assert torch.allclose(theirs["features"].float(), sae.encode(x).float(), atol=atol)


def test_folding_an_activation_scale() -> None:
    sae, x = built(), rows(50)
    expected = sae(3 * x).detach() / 3
    sae.fold_activation_scale(3.0)
    assert torch.allclose(sae(x), expected)


# ---- runs

TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


ALL_DIE = pytest.mark.filterwarnings("ignore:32 of 32 features .* are dead at the end of training:RuntimeWarning")


def run(folder: Path, **sections: Any) -> Any:
    base = run_config(
        folder,
        training={"training_tokens": 1024, "dead_feature_window": 2, **sections.pop("training", {})},
        evals={"run": []}, site={"hook_name": "hook_embed"}, model={"backend": "test:fake"},
        sae={"name": "jumprelu", "d_sae": 32, "expansion_factor": None},
    )  # fmt: skip
    base["sae"].pop("l1_coefficient")
    return saekit.train({**base, **sections}, plugins=fakes(), dataset=TEXTS)


@ALL_DIE
@pytest.mark.parametrize("scaled", ["none", "expected_average_only_in"])
def test_a_run_and_one_that_goes_on_from_it(tmp_path: Path, scaled: str) -> None:
    activations = {"source": {"name": "live", "n_batches_in_buffer": 4}, "normalize_activations": scaled}
    first = run(tmp_path / "one", activations=activations)
    assert (first.sae.threshold != 0.5).any()
    x = torch.randn(20, 8, generator=seeded())
    assert torch.allclose(SAE.load(first.folder / "sae")(x), first.sae(x), atol=1e-4)
    follow = {"from_pretrained_path": str(first.folder / "sae"), "lr": 1e-12, "training_tokens": 256}
    second = run(tmp_path / "two", activations=activations, training=follow)
    assert torch.allclose(second.sae(x), first.sae(x), atol=1e-4), "nothing is learned at this rate"


@ALL_DIE
def test_a_bfloat16_run_trains_its_thresholds_in_float32(tmp_path: Path) -> None:
    result = run(tmp_path, sae={"name": "jumprelu", "d_sae": 32, "dtype": "bfloat16"})
    assert result.sae.W_enc.dtype == torch.bfloat16
    assert result.sae.threshold.dtype == torch.float32
    assert (result.sae.threshold.bfloat16().float() != result.sae.threshold).any()
    saved = load_file(result.folder / "sae/sae_weights.safetensors")
    assert saved["threshold"].dtype == torch.float32


def test_squared_errors_are_what_is_left(way: str) -> None:
    sae, x = built(), rows(30)
    result, _ = gradients(sae, x, step_input(), way)
    assert result.losses["mse_loss"].item() == pytest.approx(squared_errors(sae(x), x).sum(-1).mean().item())
    assert result.losses["sparsity_loss"].item() == pytest.approx((sae.encode(x) > 0).sum().item() / 30)
