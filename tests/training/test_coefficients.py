"""λ and k over a run: closed forms, what is logged, resuming, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.crosscoder import CrosscoderConfig
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig
from support.kernels import built, seeded
from support.runs import contents, fake_config, resume, stopped, train, without

import saekit
from saekit.errors import ConfigError
from saekit.values import StepInput

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20


def at(step: int, steps: int | None = STEPS) -> StepInput:
    return StepInput(step=step, steps=steps, generator=seeded())


COEFFICIENTS = [
    (kind, name, warm_up, decay, end)
    for kind, name in ((StandardConfig, "l1"), (JumpReLUConfig, "l0"), (CrosscoderConfig, "l1"))
    for warm_up, decay, end in ((0, 0, 0.0), (5, 0, 0.0), (0, 8, 0.0), (5, 8, 3.0), (12, 8, 0.5), (0, 20, 0.25))
]


@pytest.mark.parametrize(("kind", "name", "warm_up", "decay", "end"), COEFFICIENTS)
def test_a_coefficient_at_every_step(kind: type, name: str, warm_up: int, decay: int, end: float) -> None:
    options = {f"{name}_coefficient": 2.0, f"{name}_warm_up_steps": warm_up}
    if decay:
        options |= {f"{name}_decay_steps": decay, f"{name}_end": end}
    config = kind(**options)
    found = [getattr(config, f"{name}_at")(at(step)) for step in range(STEPS + 3)]
    expected = [2.0 * step / warm_up for step in range(warm_up)] + [2.0] * (STEPS - warm_up - decay)
    expected += [2.0 + (end - 2.0) * j / decay for j in range(decay)]
    assert found[:STEPS] == pytest.approx(expected)
    assert found[STEPS:] == [found[STEPS - 1]] * 3, "a run whose batches are not full has more steps"


@pytest.mark.parametrize("start", [40, 7, 1])
def test_k_at_every_step(start: int) -> None:
    sae: Any = built(TopKConfig(d_sae=48, k=5, k_start=start, k_warm_up_steps=9, dtype="float64"))
    x = torch.randn(30, 12, dtype=torch.float64, generator=seeded(3))
    sae.b_enc.data += 50  # so that all are above zero
    for step in range(12):
        expected = round(start + (5 - start) * min(1, Fraction(step, 9)))
        result = sae.training_step(x, at(step))
        assert result.coefficients["k"] == expected
        assert result.fired.sum() == 30 * expected
    assert (sae.encode(x) > 0).sum() == 30 * 5, "outside training k is k"


def test_k_of_a_batch_at_every_step(way: str) -> None:
    sae: Any = built(BatchTopKConfig(d_sae=48, k=0.29, k_start=1.1, k_warm_up_steps=9, dtype="float64"))
    sae.kernels = way
    x = torch.randn(100, 12, dtype=torch.float64, generator=seeded(3))
    for step in range(12):
        k = Fraction("1.1") + (Fraction("0.29") - Fraction("1.1")) * min(Fraction(1), Fraction(step, 9))
        result = sae.training_step(x, at(step))
        assert result.coefficients["k"] == float(k)
        assert result.fired.sum() == k * 100 // 1


def test_what_does_not_move_is_not_logged() -> None:
    for config in (TopKConfig(d_sae=48, k=5), BatchTopKConfig(d_sae=48, k=5)):
        x = torch.randn(30, 12, generator=seeded(3))
        assert "k" not in built(config).training_step(x, at(0)).coefficients


def test_steps_with_so_large_a_k_that_sparse_products_cost_more_are_left_to_autograd() -> None:
    sae = built(TopKConfig(d_sae=60, k=5, k_start=50, k_warm_up_steps=10))
    (kernel,) = sae.step_kernels
    x = torch.zeros(3, 12)
    assert sae.why_reference() is None
    assert [kernel.leaves(sae, x, at(step)) for step in (0, 5, 10, 11)] == [True, True, False, False]


# ---- runs

MOVING: dict[str, dict[str, Any]] = {
    "l1": {"name": "standard", "l1_warm_up_steps": 3, "l1_decay_steps": 5, "l1_end": 0.5},
    "l0": {"name": "jumprelu", "l0_warm_up_steps": 2, "l0_decay_steps": 6, "initial_threshold": 0.01},
    "k": {"name": "topk", "k": 2, "k_start": 10, "k_warm_up_steps": 8},
    "batch": {"name": "batchtopk", "k": 1.5, "k_start": 10, "k_warm_up_steps": 8},
}


def run(folder: Path, kind: str) -> dict[str, Any]:
    config = fake_config(folder)
    config["sae"] = {"d_sae": 24, **MOVING[kind]}
    config["training"] = {key: value for key, value in config["training"].items() if "finetun" not in key}
    return config


@pytest.mark.parametrize("kind", MOVING)
def test_a_run_that_is_stopped_on_the_way_goes_on_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    whole = train(run(tmp_path / "whole", kind))
    assert stopped(run(tmp_path / "parts", kind), 5).step == 5
    resumed = resume(tmp_path / "parts/run")
    assert resumed.metrics == whole.metrics
    for own, other in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(own, other)
    own = without(contents(tmp_path / "parts/run"), "checkpoints/step-5/")
    assert own["sae/sae_weights.safetensors"] == contents(whole.folder)["sae/sae_weights.safetensors"]
    still = {key: value for key, value in MOVING[kind].items() if key in ("name", "k", "initial_threshold")}
    config = run(tmp_path / "still", kind)
    config["sae"] = {"d_sae": 24, **still}
    assert not torch.equal(train(config).sae.W_enc, whole.sae.W_enc), "it has an effect"


@pytest.mark.parametrize("kind", ["k", "batch", "l1"])
def test_compiled_losses_follow(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As often as the number changes, with a compiler that takes no time."""
    options = {name: value for name, value in MOVING[kind].items() if name != "name"}
    make: Callable[..., Any] = {"k": TopKConfig, "batch": BatchTopKConfig, "l1": StandardConfig}[kind]
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend="eager"))
    torch._dynamo.reset()
    plain, compiled = (built(make(d_sae=48, dtype="float64", **options)) for _ in range(2))
    plain.kernels = "reference"
    compiled.compile_losses()
    x = torch.randn(30, 12, dtype=torch.float64, generator=seeded(3))
    for step in range(STEPS):
        found, expected = (sae.training_step(x, at(step)) for sae in (compiled, plain))
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        assert found.coefficients.keys() == expected.coefficients.keys()
        for sae in (plain, compiled):
            sae.zero_grad()
    torch._dynamo.reset()


# ---- what is refused


@pytest.mark.parametrize(("make", "options", "message"), [
    (StandardConfig, {"l1_end": 0.5}, "l1_end: is where l1_coefficient goes in l1_decay_steps: give these, too"),
    (JumpReLUConfig, {"l0_end": 0.5}, "l0_end: is where l0_coefficient goes in l0_decay_steps: give these, too"),
    (StandardConfig, {"l1_decay_steps": 5, "l1_end": 5.0},
     "l1_decay_steps: lead from l1_coefficient to l1_end, and both are 5: leave them out"),
    (TopKConfig, {"k_start": 64}, "k_start: is of the way from k_start to k in k_warm_up_steps: give k_warm_up_steps"),
    (TopKConfig, {"k_warm_up_steps": 64}, "k_warm_up_steps: is of the way .*: give k_start, too, or neither"),
    (GroupMaxConfig, {"k_warm_up_steps": 6, "k_start": 64}, "k_start: is not for groupmax, whose k groups are of one"),
    (BatchTopKConfig, {"k_warm_up_steps": 6, "k_start": 32.0}, "k_start: is 32, and so is k: leave it and k_warm"),
])  # fmt: skip
def test_options_that_would_do_nothing(make: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_start_of_more_than_there_are() -> None:
    for kind in (TopKConfig, BatchTopKConfig):
        with pytest.raises(ConfigError, match="sae.k_start: is 40, but there are only 30 features"):
            built(kind(d_sae=30, k=5, k_start=40, k_warm_up_steps=5))


def test_a_decay_of_which_nobody_knows_the_end() -> None:
    config = StandardConfig(l1_decay_steps=5)
    with pytest.raises(
        ConfigError, match="sae.l1_decay_steps are the last steps of training, and StepInput.steps does"
    ):
        config.l1_at(at(3, steps=None))


@pytest.mark.parametrize(("sae", "message"), [
    ({"name": "topk", "k": 4, "k_start": 9, "k_warm_up_steps": 500},
     r"sae.k_warm_up_steps: is 500, and training has \d+ steps, so k would never be reached; lower it, or train"),
    ({"name": "batchtopk", "k": 4, "k_start": 9, "k_warm_up_steps": 500}, "so k would never be reached"),
    ({"name": "topk_transcoder", "k": 4, "k_start": 9, "k_warm_up_steps": 500}, "so k would never be reached"),
    ({"name": "crosscoder", "l1_warm_up_steps": 500}, "so l1_coefficient would never be reached"),
    ({"name": "standard", "l1_decay_steps": 500},
     r"sae.l1_decay_steps: is 500, after a warm-up of 0, and training has \d+ steps; lower one, or train longer"),
    ({"name": "jumprelu", "l0_warm_up_steps": 2, "l0_decay_steps": 15},
     r"sae.l0_decay_steps: is 15, after a warm-up of 2, and training has \d+ steps"),
])  # fmt: skip
def test_what_is_longer_than_the_run_is_said_before_it(tmp_path: Path, sae: dict[str, Any], message: str) -> None:
    config = run(tmp_path, "l1") | {"sae": {"d_sae": 24, **sae}}
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
    assert saekit.default_manager().find("sae_architectures", sae["name"]).entry.precheck is not None
