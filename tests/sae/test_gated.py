"""The architecture ``gated``: beside its peers, one step beside the other, finite differences, files and runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.standard import StandardConfig
from safetensors.torch import load_file, save_file
from support import levels
from support.kernels import count_screens, looking_in_int8, seeded
from support.levels import Golden, check_loss, close, must_agree, must_be_slopes, stepped
from support.saved import READER, sae_lens_python
from support.training import fakes, run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import TrainingConfig
from saekit.errors import ConfigError, SAEFormatError
from saekit.kernels import SparseFeatures, Workspace
from saekit.planning.step_costs import step_bytes

D_IN, D_SAE = 12, 40
DICTIONARY_LEARNING = {
    "W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias", "b_gate": "gate_bias",
    "b_mag": "mag_bias",
}  # fmt: skip
FREE = {"normalize_sae_decoder": False, "decoder_heuristic_init": True}
SAE_LENS_6 = {"aux_loss_trains_decoder": True, "scale_sparsity_penalty_by_decoder_norm": True, **FREE}


def built(bias: float = 0.0, ports: Any = D_IN, **options: Any) -> SAE:
    """Random weights, decoder rows of many norms, gates with a bias."""
    sae = levels.built(GatedConfig(**{"d_sae": D_SAE, "dtype": "float64", "l1_coefficient": 0.4, **options}), ports)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded()) / 2)
        sae.b_gate += bias
        sae.W_dec *= 0.1 + torch.rand(sae.d_sae, 1, generator=seeded(1), dtype=torch.float64)
    return sae


def rows(n: int, d_in: int = D_IN) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=seeded(5))


def defined(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and reconstructions, in NumPy, from the tensors of a folder of sae-lens."""
    t = {name: value.double().numpy() for name, value in sae.public_tensors().items()}
    x_bar = x - t["b_dec"]
    active = x_bar @ t["W_enc"] + t["b_gate"] > 0
    features = active * np.maximum(x_bar @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"], 0)
    return features, features @ t["W_dec"] + t["b_dec"]


# ---- beside the peers


@pytest.mark.parametrize("name", ["plain", "warm_up", "no_b_dec_to_input", "activations_scaled"])
def test_steps_equal_those_of_sae_lens(way: str, name: str) -> None:
    golden = Golden(f"gated_{name}")
    trainer = golden.trainer(GatedConfig(d_sae=48, dtype="float64", **SAE_LENS_6, **golden.options), beta1=0.9)
    names = {"overall_loss": "loss", "mse_loss": "mse_loss"}
    names["auxiliary_reconstruction_loss"] = "auxiliary_reconstruction_loss"
    golden.check(trainer, {f"losses/{ours}": theirs for ours, theirs in names.items()})
    sae = trainer.raw_sae()
    saved, expected = sae.public_tensors(), golden.part("saved.")
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        close(saved[key], value, f"saved {key}")
    with torch.no_grad():
        close(sae(golden.batches[0]), golden.tensors["output"], "output")
        close(sae.encode(golden.batches[0]), golden.tensors["features"], "features")


def test_steps_equal_those_of_dictionary_learning(way: str) -> None:
    golden = Golden("gated_dictionary_learning", DICTIONARY_LEARNING)
    options = golden.options
    config = GatedConfig(
        d_sae=48, dtype="float64", l1_coefficient=options["l1_penalty"],
        l1_warm_up_steps=options["sparsity_warmup_steps"],
    )  # fmt: skip
    trainer = golden.trainer(config, beta1=0.0, clip_grad_norm=0.0)
    names = {"overall_loss": "loss", "mse_loss": "mse_loss", "auxiliary_reconstruction_loss": "aux_loss"}
    golden.check(trainer, {f"losses/{ours}": theirs for ours, theirs in names.items()})


@pytest.mark.parametrize(
    ("name", "names", "options"),
    [("sae_lens_1_gated", {}, SAE_LENS_6),
     ("dictionary_learning_gated", DICTIONARY_LEARNING, {})],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_peer(way: str, name: str, names: Any, options: dict[str, Any]) -> None:
    config = GatedConfig(d_sae=64, dtype="float64", l1_coefficient=0.3, **options)
    result, theirs, sae = check_loss(config, name, names, way)
    if "features" in theirs:
        assert 0.3 * result.losses["l1_loss"].item() == pytest.approx(theirs["loss.l1_loss"].item(), rel=1e-12)
        close(sae.encode(theirs["x"]).detach(), theirs["features"])
        close(result.output, theirs["recons"])


# ---- one step beside the other

OPTIONS: list[dict[str, Any]] = [
    {"l1_warm_up_steps": 9},
    SAE_LENS_6,
    {**SAE_LENS_6, "aux_loss_trains_decoder": False},
    {**FREE, "apply_b_dec_to_input": False},
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encoder", "gradients", "active"):
        monkeypatch.setattr(f"saekit.kernels.{module}.CHUNK", 32)
    monkeypatch.setattr("saekit_plugins.architectures.gated.module._ROWS", 20)  # parts that gradients split again


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("bias", [-3.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_the_fast_step_is_that_of_autograd(options: dict[str, Any], bias: float, factor: bool) -> None:
    sae, x = built(bias, **options), rows(90)
    with torch.no_grad():
        kinds = {type(group) for _, group in sae.step_kernels[0].groups(sae, x, Workspace())}
    assert kinds == ({SparseFeatures} if bias else {Tensor}), kinds
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.copy_(torch.rand(D_SAE, generator=seeded(3)) + 0.5)
    fast, reference = (stepped(sae, x, None, way, step=4) for way in ("fast", "reference"))
    must_agree(fast, reference)
    assert all(bool(value.any()) for value in reference[1].values())
    for method in ("scale", "decoder", "unrotated_decoder"):
        sae.add_factors_for(method)
        sae.learn_only(sae.table.trained_by(method))
        must_agree(*(stepped(sae, x, None, way) for way in ("fast", "reference")))


@pytest.mark.parametrize("weighed", [True, False])
def test_gradients_are_the_slopes_of_the_loss(way: str, weighed: bool) -> None:
    """No gate is near its edge, where the loss jumps."""
    sae, x = built(**SAE_LENS_6 | {"scale_sparsity_penalty_by_decoder_norm": weighed}), rows(20)
    pre = sae.pre_activations(x)
    assert (pre + sae.b_gate).abs().min() > 1e-4
    must_be_slopes(sae, x, None, way)


def test_gates_alone_learn_from_the_second_reconstruction() -> None:
    """What is held has the slope of a loss in which it is another tensor."""
    sae, x = built(l1_coefficient=0.0, **FREE), rows(20)
    _, found = stepped(sae, x, None, "reference")
    free, both = stepped(built(l1_coefficient=0.0, aux_loss_trains_decoder=True, **FREE), x, None, "reference")
    aux = sae.W_dec.detach().clone().requires_grad_(), sae.b_dec.detach().clone().requires_grad_()
    gates = (sae.pre_activations(x) + sae.b_gate).relu().detach()
    (gates @ aux[0] + aux[1] - x).pow(2).sum(-1).mean().backward()
    assert torch.allclose(both["W_dec"] - found["W_dec"], aux[0].grad)
    assert torch.equal(both["b_gate"], found["b_gate"])
    assert free.losses["auxiliary_reconstruction_loss"] > 0


@pytest.mark.parametrize("kernels", ["auto", "int8"])
def test_a_screen_misses_no_open_gate(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has bfloat16 products, and where it has none."""
    sae = built(-9.0, ports=64, d_sae=2048, dtype="float32")
    sae.kernels = kernels
    looking_in_int8(monkeypatch)
    calls = count_screens(monkeypatch)
    x = torch.randn(400, 64, generator=seeded(2))
    with torch.no_grad():
        found, expected = sae.encode(x), sae.features_of(sae.pre_activations(x))
    assert 0 < (expected > 0).float().mean() < 0.05
    assert calls or kernels == "auto"
    assert torch.allclose(found, expected, atol=1e-5)
    assert bool((sae.encode_sparse(x).values > 0).all())


def test_what_a_step_takes_counts_gates_beside_features() -> None:
    training = TrainingConfig(training_tokens=10_000, train_batch_size_tokens=100)
    plain = levels.built(StandardConfig(d_sae=D_SAE), D_IN)
    more = step_bytes(built(dtype="float32"), training, "cpu") - step_bytes(plain, training, "cpu")
    assert more == 3 * 100 * D_SAE * 4


# ---- options, scales, files


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="scale_sparsity_penalty_by_decoder_norm: has no effect while normalize_sae_"):
        GatedConfig(scale_sparsity_penalty_by_decoder_norm=True)
    with pytest.raises(ConfigError, match="l1_coefficient: must be 0 or more, found -1.0"):
        GatedConfig(l1_coefficient=-1.0)
    with pytest.raises(ConfigError, match="sae.activation: is not ReLU, and gated is defined by magnitudes above zero"):
        built(activation="tanh-relu")


@pytest.mark.parametrize("apply", [True, False])
def test_a_scale_changes_b_dec_and_no_other_bias(apply: bool) -> None:
    """Features stay as they are: gates and magnitudes are those of scaled activations."""
    sae, x = built(apply_b_dec_to_input=apply), rows(50)
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    output, features = sae(3 * x).detach() / 3, sae.encode(3 * x).detach()
    sae.fold_activation_scale(3.0)
    assert torch.allclose(sae(x), output)
    assert torch.allclose(sae.encode(x), features)
    for name in ("b_gate", "b_mag", "r_mag"):
        assert torch.equal(sae.get_parameter(name), before[name])
    assert torch.allclose(sae.b_dec, before["b_dec"] / 3)


@pytest.mark.parametrize(
    ("dtype", "factor"), [("float64", False), ("float64", True), ("float32", False), ("bfloat16", False)]
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, dtype: str, factor: bool) -> None:
    sae, x = with_site(built(dtype=dtype)), rows(50)
    if factor:
        sae.add_scaling_factor()
        sae.scaling_factor.data.uniform_(0.5, 2, generator=seeded(3))
    folder = sae.save(tmp_path / "sae")
    table = json.loads((folder / "cfg.json").read_text())
    assert table["architecture"] == "gated"
    tensors = {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert set(load_file(folder / "sae_weights.safetensors")) == tensors
    loaded, of_sae_lens = SAE.load(folder), SAE.load(folder, loader="sae_lens")
    assert type(loaded) is type(of_sae_lens) is type(sae)
    assert loaded.config == sae.config
    assert loaded.info.options == sae.info.options
    for one in (loaded, of_sae_lens):
        assert torch.allclose(one(x), sae(x))
    if dtype == "float64":
        for found, expected in zip((sae.encode(x), sae(x)), defined(sae, x.numpy()), strict=True):
            assert np.allclose(found.detach(), expected)


def with_site(sae: SAE) -> SAE:
    sites = saekit.Sites.one(saekit.Site(hook_name="blocks.0.hook_resid_post"))
    sae.info = attrs.evolve(sae.info, sites=sites, metadata={"model_name": "gpt2-small"})
    return sae


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
    atol = 1e-5 if dtype == "float32" else 0.2
    assert torch.allclose(theirs["out"].float(), sae(x).float(), atol=atol)
    assert torch.allclose(theirs["features"].float(), sae.encode(x).float(), atol=atol)


def test_a_folder_without_its_gates(tmp_path: Path) -> None:
    fixture = Path(__file__).parents[1] / "fixtures/sae_lens_6.54.12_gated"
    table, tensors = json.loads((fixture / "cfg.json").read_text()), load_file(fixture / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(table))
    save_file({**tensors, "b_enc": tensors["b_mag"].clone()}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match="do not fit saekit:gated: b_enc is not a tensor of this architecture"):
        SAE.load(tmp_path)
    del tensors["b_gate"]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match="do not fit saekit:gated: b_gate is missing"):
        SAE.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**table, "activation_fn": "tanh-relu"}))
    with pytest.raises(SAEFormatError, match="the activation of the gated SAE in .* is 'tanh-relu', expected 'relu'"):
        SAE.load(tmp_path)


# ---- runs

TEXTS = [{"text": f"value_{n} = {n * n}\n" * 30} for n in range(60)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scaled", ["none", "expected_average_only_in"])
def test_a_run_and_one_that_goes_on_from_it(tmp_path: Path, scaled: str, dtype: str) -> None:
    def run(name: str, **training: Any) -> Any:
        base = run_config(
            tmp_path / name, training={"training_tokens": 1024, "dead_feature_window": 2, **training},
            evals={"run": []}, site={"hook_name": "hook_embed"}, model={"backend": "test:fake"},
            activations={"source": {"name": "live", "n_batches_in_buffer": 4}, "normalize_activations": scaled},
        )  # fmt: skip
        base["sae"] = {"name": "gated", "d_sae": 32, "l1_coefficient": 0.1, "dtype": dtype}
        if dtype == "bfloat16":  # in which no row has norm 1 to the last digit
            base["sae"]["normalize_sae_decoder"] = False
        return saekit.train(base, plugins=fakes(), dataset=TEXTS)

    first = run("one")
    atol = 1e-4 if dtype == "float32" else 0.1
    x = torch.randn(20, 8, generator=seeded())
    assert torch.allclose(SAE.load(first.folder / "sae")(x), first.sae(x), atol=1e-5)
    second = run("two", from_pretrained_path=str(first.folder / "sae"), lr=1e-12, training_tokens=256)
    assert torch.allclose(second.sae(x), first.sae(x), atol=atol), "nothing is learned at this rate"
    assert bool(first.sae.r_mag.any())
