"""``topk_transcoder`` as sparsify trains it: its recorded steps in float64, its start, and the options for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.topk import TopKConfig
from saekit_plugins.architectures.transcoder import JumpReLUTranscoderConfig, TopKTranscoderConfig, TranscoderConfig
from safetensors import safe_open
from safetensors.torch import load_file
from support import ports
from support.kernels import seeded
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import SAEConfig
from saekit.errors import ConfigError
from saekit.sae.build import build_module, initialize
from saekit.values import Ports, StepInput

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden_sparsify"
CASES = ("skip", "skip_auxk", "few_dead", "k_decay")
AS_SPARSIFY: dict[str, Any] = {
    "dtype": "float64",
    "rescale_acts_by_decoder_norm": False,
    "decoder_heuristic_init": False,
    "decoder_zero_init": True,
    "b_enc_init_method": "centered",
    "b_dec_init_method": "mean",
    "mse_loss_normalization": "variance",
    "aux_loss_normalization": "none",
}


def built(config: SAEConfig, ports: Ports) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, ports, plugins)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
    assert deviation <= 1e-9, f"{what} deviates by {deviation:.1e}"


def golden(name: str) -> tuple[SAE, dict[str, Any], dict[str, Tensor]]:
    """The SAE as sparsify's began, the options, and what was recorded."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["options"])
    recorded = load_file(path)
    d_in, d_sae = recorded["init.W_enc"].shape
    config = TopKTranscoderConfig(
        **AS_SPARSIFY,
        d_sae=d_sae,
        k=options["k"],
        skip_connection=options.get("skip_connection", False),
        aux_loss_coefficient=options["alpha"],
        aux_loss_trains_encoder=not options["alpha"],
        k_warm_up_steps=options.get("k_decay_steps", 0),
        k_start=options["start"] if "k_decay_steps" in options else None,
    )
    sae = built(config, Ports({"read": d_in}, {"written": d_in}))
    with torch.no_grad():
        for key, value in sae.named_parameters():
            value.copy_(recorded[f"init.{key}"])
    return sae, options, recorded


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_sparsify(way: str, name: str) -> None:
    sae, options, recorded = golden(name)
    sae.kernels = way  # type: ignore[assignment]
    rows = {key: value.double() for key, value in load_file(GOLDEN / "rows.safetensors").items()}
    adam = torch.optim.Adam(sae.parameters(), lr=options["lr"])
    for step, (x, y) in enumerate(zip(rows["x"], rows["y"], strict=True)):
        dead = recorded["dead"][step] if options["alpha"] else None
        adam.zero_grad()
        result = sae.training_step(x, StepInput(step=step, steps=24, generator=seeded(), dead=dead, target=y))
        close(result.loss, recorded["trace.loss"][step], f"the loss of step {step}")
        close(result.losses["mse_loss"], recorded["trace.fvu"][step], f"the FVU of step {step}")
        aux = options["alpha"] * recorded["trace.auxk"][step]
        close(result.losses["auxiliary_reconstruction_loss"], aux, f"AuxK of step {step}")
        if "k_decay_steps" in options:
            assert result.coefficients["k"] == recorded["trace.k"][step]
        if f"grad{step}.W_enc" in recorded:
            for key, value in sae.named_parameters():
                close(value.grad, recorded[f"grad{step}.{key}"], f"the gradient of {key}")  # type: ignore[arg-type]
        adam.step()
    for key, value in sae.named_parameters():
        close(value.detach(), recorded[f"final.{key}"], key)


def test_the_start_is_that_of_sparsify() -> None:
    sae, _, recorded = golden("skip")
    rows = load_file(GOLDEN / "rows.safetensors")
    x, y = rows["x"][0].double(), rows["y"][0].double()
    initialize(sae, seeded(), x, 2.0, target=y, target_scale=3.0)
    assert sae.config.starts_from_activations
    assert not sae.W_dec.any()
    assert not sae.W_skip.any()
    assert sae.W_enc.any()
    assert torch.allclose(sae.b_enc, -(2 * x).mean(0) @ sae.W_enc)
    assert sae.pre_activations(2 * x).mean(0).abs().max() < 1e-9
    assert torch.allclose(sae.b_dec, 3 * y.mean(0))
    assert torch.allclose(recorded["init.b_enc"], -x.mean(0) @ recorded["init.W_enc"])


def test_a_start_from_inputs_alone_asks_for_a_sample() -> None:
    config = TranscoderConfig(b_enc_init_method="centered", b_dec_init_method="zeros")
    assert config.starts_from_activations
    assert not TranscoderConfig(b_dec_init_method="zeros").starts_from_activations
    assert TranscoderConfig().starts_from_activations


PORTS = Ports({"a": 5, "b": 4}, {"c": 3, "d": 6})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("normalization", ["none", "residual_variance"])
def test_finite_differences_and_the_fast_step(skip: bool, trains: bool, normalization: str) -> None:
    """The variance that the loss is counted in is that of the targets, not of what the skip connection leaves over."""
    config = TopKTranscoderConfig(
        d_sae=30, dtype="float64", k=4, skip_connection=skip, mse_loss_normalization="variance",
        aux_loss_coefficient=0, rescale_acts_by_decoder_norm=trains,
    )  # fmt: skip
    with_aux = TopKTranscoderConfig(
        d_sae=30, dtype="float64", k=4, skip_connection=skip, mse_loss_normalization="variance", k_aux=3,
        aux_loss_coefficient=0.7, aux_loss_trains_encoder=trains, aux_loss_normalization=normalization,  # type: ignore[arg-type]
        rescale_acts_by_decoder_norm=trains,
    )  # fmt: skip
    x, y = (torch.randn(40, d, dtype=torch.float64, generator=seeded(d)) for d in (PORTS.d_in, PORTS.d_out))
    dead = torch.arange(30) % 3 == 0
    for options in (config, with_aux):
        sae = built(options, PORTS)
        with torch.no_grad():
            for value in sae.parameters():
                value.copy_(torch.randn(value.shape, generator=seeded(1)) / 2)
        step = StepInput(step=2, generator=seeded(), dead=dead, target=y)
        found = {}
        for way in ("fast", "reference"):
            sae.kernels = way  # type: ignore[assignment]
            assert (sae.why_reference() is None) == (way == "fast")
            result = sae.training_step(x, step)
            found[way] = {name: value.grad for name, value in sae.named_parameters()}, result
            for value in sae.parameters():
                value.grad = None
        (fast, one), (plain, other) = found["fast"], found["reference"]
        close(one.loss, other.loss, "the loss")
        for name, value in plain.items():
            assert (fast[name] - value).abs().max() <= 1e-9 * value.abs().max().clamp_min(1e-9), name  # type: ignore[operator]
        if options is config:
            fvu = (sae(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
            close(one.loss, fvu.detach(), "the FVU")
            check_slopes(sae, x, step, fast)


def check_slopes(sae: SAE, x: Tensor, step: StepInput, found: dict[str, Any]) -> None:
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch, where its compiler begins anew
def test_a_compiled_step_with_a_skip_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that takes no time."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend="eager"))
    torch._dynamo.reset()
    (compiled, _, recorded), (plain, _, _) = golden("k_decay"), golden("k_decay")
    plain.kernels = "reference"
    compiled.compile_losses()
    rows = {key: value.double() for key, value in load_file(GOLDEN / "rows.safetensors").items()}
    for number in range(4):
        step = StepInput(step=number, generator=seeded(), dead=recorded["dead"][number], target=rows["y"][number])
        for sae in (compiled, plain):
            sae.training_step(rows["x"][number], step)
        for (name, value), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            close(value.grad, other.grad, name)  # type: ignore[arg-type]
            value.grad = other.grad = None
    torch._dynamo.reset()


def test_a_batch_without_variance_counts_as_it_is(way: str) -> None:
    sae, _, _ = golden("skip")
    sae.kernels = way  # type: ignore[assignment]
    row = torch.ones(1, sae.d_in, dtype=torch.float64)
    result = sae.training_step(row, StepInput(step=0, generator=seeded(), target=row))
    assert result.loss.item() == pytest.approx((sae(row) - row).pow(2).sum().item())


@pytest.mark.parametrize("kind", [TranscoderConfig, JumpReLUTranscoderConfig, TopKTranscoderConfig])
@pytest.mark.parametrize(("options", "message"), [
    ({"decoder_heuristic_init": True}, "decoder_heuristic_init: starts from decoder rows of norm 0.1, and dec"),
    ({"normalize_sae_decoder": True}, "normalize_sae_decoder: keeps decoder rows at norm 1"),
    ({"decoder_orthogonal_init": True}, "decoder_orthogonal_init: starts from an orthogonal decoder"),
    ({"init_encoder_as_decoder_transpose": True}, "init_encoder_as_decoder_transpose: makes the encoder of the deco"),
])  # fmt: skip
def test_starts_that_contradict_a_decoder_of_zeros(kind: type, options: dict[str, Any], message: str) -> None:
    others = {"scale_sparsity_penalty_by_decoder_norm": False} if kind is TranscoderConfig else {}
    with pytest.raises(ConfigError, match=message):
        kind(**{"decoder_zero_init": True, "decoder_heuristic_init": False, **others, **options})


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="rescale_acts_by_decoder_norm: compares features by the norms of decoder r"):
        TopKTranscoderConfig(decoder_zero_init=True, decoder_heuristic_init=False)
    with pytest.raises(ConfigError, match="aux_loss_trains_encoder: is of AuxK, and aux_loss_coefficient is 0"):
        TopKConfig(aux_loss_trains_encoder=False, aux_loss_coefficient=0)


def run(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    config = ports.run(folder, saekit.Sites((ports.EMBED,), (ports.LATE,)), checkpoints={"name": name})
    training = config["training"] | {"train_batch_size_tokens": 64, "training_tokens": 128}
    return config | {"sae": {"name": "topk_transcoder", "d_sae": 20, "k": 3, **options}, "training": training}


def test_a_run_looks_at_inputs_for_its_start_and_weights_that_are_saved_have_one(tmp_path: Path) -> None:
    """Where nothing else asks for activations to come."""
    still = {"b_dec_init_method": "zeros", "aux_loss_coefficient": 0}
    config = run(tmp_path, "first", b_enc_init_method="centered", **still)
    config["training"] |= {"lr": 1e-12}
    first = ports.train(config)
    assert not first.sae.b_dec.abs().max() > 1e-9
    assert first.sae.b_enc.abs().min() > 1e-6
    start = {"from_pretrained_path": str(first.folder)}
    config = run(tmp_path, "second", b_enc_init_method="centered", decoder_zero_init=True,
                 decoder_heuristic_init=False, rescale_acts_by_decoder_norm=False)  # fmt: skip
    config["training"] |= start
    with pytest.raises(ConfigError) as caught:
        ports.train(config)
    for name in ("b_enc_init_method", "decoder_zero_init"):
        assert f"sae.{name}: chooses a start, but training starts from the SAE in {first.folder} " in str(caught.value)
    config = run(tmp_path, "second", aux_loss_coefficient=0)
    config["training"] |= start
    assert ports.train(config).sae.b_enc.abs().min() > 1e-6
