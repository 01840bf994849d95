"""Compiled steps, and steps on a GPU, give the same numbers."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from support.compiled import real_compiler
from support.training import DOCUMENTS, fake_run, fakes, fit, hashes, make_trainer, rows, train, weights
from torch import Tensor

import saekit
from saekit.errors import ConfigError, TrainingInterrupted
from saekit.training.trainer import SAETrainer
from saekit.values import StepInput

pytestmark = pytest.mark.usefixtures("way")


# ---- compile


@attrs.define
class Compiled:
    """What a backend was given to compile, and how often that ran."""

    graphs: int = 0
    runs: int = 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """torch.compile with a backend that counts and runs what it was given as it is, which is quick."""
    found, real = Compiled(), torch.compile

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        found.graphs += 1

        def run(*args: Any) -> Any:
            found.runs += 1
            return graph.forward(*args)

        return run

    def patched(function: Any, *, mode: str) -> Any:
        assert mode == "default"
        return real(function, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", patched)
    yield found
    torch._dynamo.reset()


COMPILED = [
    {},
    {"l1_warm_up_steps": 6, "activation": "tanh-relu", "mse_loss_normalization": "dense_batch"},
    {"l1_warm_up_steps": 6, "noise_scale": 0.3},
    {"l1_warm_up_steps": 6, "noise_scale": 0.3, "use_ghost_grads": True, "lp_norm": 2.0, "normalize_sae_decoder": False,
     "scale_sparsity_penalty_by_decoder_norm": True},
]  # fmt: skip


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiled_code_runs_in_every_step_and_gives_the_same_numbers(
    compiled: Compiled, options: dict[str, Any]
) -> None:
    """Twelve steps, the last of them on a smaller batch; the learning rate, λ and what is dead change."""
    plain = make_trainer(1163, asleep=6, **options)
    expected = fit(plain)
    assert compiled.runs == 0
    trainer = make_trainer(1163, asleep=6, training={"compile": True}, **options)
    found = fit(trainer)
    assert compiled.runs == len(found) == 12, "all of a step is one piece"
    assert 1 < compiled.graphs <= 4
    for one, other in zip(found, expected, strict=True):
        density = [metrics.pop("plots/feature_density_line_chart", None) for metrics in (one, other)]
        assert density[0] == density[1]
        assert one == pytest.approx(other, rel=1e-5, abs=1e-12)
    if options.get("use_ghost_grads"):
        assert found[-1]["losses/ghost_grad_loss"] > 0
    for name, value in weights(plain).items():
        assert torch.allclose(weights(trainer)[name], value, rtol=1e-5, atol=1e-12), name


def test_the_sae_for_raw_activations_is_no_longer_tied_to_the_compiled_one(compiled: Compiled) -> None:
    trainer = make_trainer(300, training={"compile": True})
    trainer.scale = 2.0
    fit(trainer)
    raw = trainer.raw_sae()
    raw.training_step(rows(10), StepInput(step=0, generator=torch.Generator()))
    assert compiled.runs == 3
    assert raw.W_enc.grad is not None
    assert trainer.sae.W_enc.grad is None


def test_a_change_of_what_is_dead_does_not_compile_for_ever(compiled: Compiled) -> None:
    """Ghost gradients depend on the number of dead features, which may be another in every step."""
    trainer = make_trainer(
        4000, use_ghost_grads=True, l1_warm_up_steps=9, training={"compile": True, "dead_feature_window": 10**6}
    )
    for step, batch in enumerate(rows(4000).split(100)):
        trainer.firing.since_fired[: step * step % 17] = 10**7
        trainer.train_on(batch)
        trainer.firing.since_fired.zero_()
    assert compiled.runs == 40
    assert compiled.graphs <= 6


def test_autocast_holds_in_compiled_code(compiled: Compiled) -> None:
    full, half, both = (
        make_trainer(500, dtype="float32", noise_scale=0.1, training=options)
        for options in ({}, {"autocast": True}, {"autocast": True, "compile": True})
    )
    for trainer in (full, half, both):
        fit(trainer)
    assert compiled.runs == 5
    for name, value in weights(half).items():
        assert torch.allclose(weights(both)[name], value, rtol=1e-4, atol=1e-5), name
        assert not torch.allclose(weights(full)[name], value, rtol=1e-4, atol=1e-5), name


def test_fine_tuning_compiles_too(compiled: Compiled) -> None:
    tuning = {"finetuning_tokens": 500, "finetuning_method": "unrotated_decoder"}
    plain = make_trainer(500, training=tuning)
    trainer = make_trainer(500, training={"compile": True, **tuning})
    fit(plain), fit(trainer)
    assert compiled.runs == 10
    for name, value in weights(plain).items():
        assert torch.allclose(weights(trainer)[name], value, rtol=1e-5, atol=1e-12), name


def test_a_compiled_run_that_is_resumed_is_the_uninterrupted_one(
    tmp_path: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fake_run(
        tmp_path,
        activations={"normalize_activations": "expected_average_only_in"},
        sae={"noise_scale": 0.1, "use_ghost_grads": True, "l1_warm_up_steps": 4},
        training={"compile": True, "dead_feature_window": 1},
        evals={"run": ["reconstruction"], "every_n_steps": 3},
    )
    whole = train(config | {"checkpoints": {"folder": str(tmp_path), "name": "whole"}})
    assert compiled.runs == 8
    step = SAETrainer.train_on

    def stopping(trainer: SAETrainer, batch: Tensor, *rest: Any) -> Any:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "train_on", stopping)
        with pytest.raises(TrainingInterrupted):
            train(config | {"checkpoints": {"folder": str(tmp_path), "name": "parts"}})
    assert 8 < compiled.runs < 16
    torch._dynamo.reset()
    resumed = saekit.resume(tmp_path / "parts", plugins=fakes(), dataset=DOCUMENTS)
    assert compiled.runs == 16
    assert resumed.metrics == whole.metrics
    assert hashes(resumed.folder) == hashes(whole.folder)


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile

    def backend(graph: object, example: object) -> Any:
        raise RuntimeError("no working C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend=backend))
    with pytest.raises(ConfigError, match=r"training.compile: the SAE's step cannot be compiled here: .*no working C"):
        train(fake_run(tmp_path, training={"compile": True}))
    found = saekit.plan(fake_run(tmp_path, training={"compile": True}), plugins=fakes(), dataset=DOCUMENTS)
    assert any("training.compile: the SAE's step cannot be compiled here" in problem for problem in found.problems)
    torch._dynamo.reset()


@pytest.fixture
def real() -> Iterator[None]:
    with real_compiler():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("real")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_with_the_real_compiler(device: str) -> None:
    torch._dynamo.reset()
    options = {"noise_scale": 0.1, "use_ghost_grads": True, "dtype": "float32", "device": device, "asleep": 5}
    torch._dynamo.utils.counters.clear()
    plain = make_trainer(500, training={"dead_feature_window": 1}, **options)
    trainer = make_trainer(500, training={"compile": True, "dead_feature_window": 1}, **options)
    expected = fit(plain)
    state, found = {}, []
    for step, batch in enumerate(rows(500).split(100)):
        if step == 3:
            state = copy.deepcopy(trainer.state_dict())
        found.append(trainer.train_on(batch))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    for one, other in zip(found, expected, strict=True):
        assert one["losses/overall_loss"] == pytest.approx(other["losses/overall_loss"], rel=1e-5)
        assert one["details/grad_norm"] == pytest.approx(other["details/grad_norm"], rel=1e-5)
    assert found[-1]["losses/ghost_grad_loss"] > 0
    for name, value in weights(plain).items():
        assert torch.allclose(weights(trainer)[name], value, rtol=1e-5, atol=1e-5), name
    torch._dynamo.reset()
    resumed = make_trainer(500, training={"compile": True, "dead_feature_window": 1}, **options)
    resumed.load_state_dict(state)
    for batch in rows(500).split(100)[3:]:
        resumed.train_on(batch)
    for name, value in weights(trainer).items():
        assert torch.equal(weights(resumed)[name], value), name
    torch._dynamo.reset()


# ---- devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("gpu", ["cuda"])
@pytest.mark.parametrize("options", [*COMPILED, {"normalize_sae_decoder": False, "lp_norm": 0.5}], ids=str)
def test_a_gpu_gives_the_cpus_numbers(gpu: str, options: dict[str, Any]) -> None:
    """But for noise, which each device draws in its own way."""
    options = {**options, "noise_scale": 0.0}
    on_cpu, on_gpu = make_trainer(asleep=6, **options), make_trainer(asleep=6, device=gpu, **options)
    for one, other in zip(fit(on_gpu), fit(on_cpu), strict=True):
        for metrics in (one, other):
            metrics.pop("plots/feature_density_line_chart", None)
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    noisy = [make_trainer(device=gpu, noise_scale=0.3) for _ in range(2)]
    for trainer in noisy:
        fit(trainer)
    for name, value in weights(noisy[0]).items():
        assert torch.equal(value, weights(noisy[1])[name]), name
