"""The training step's options, each against its own definition: clip, statistics, metrics, autocast, compile, seeds."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saekit_plugins.architectures.standard import StandardConfig
from support.tiny import run_config
from test_training import hashes, lines
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import saekit
from saekit.config import OptimizerConfig, TrainingConfig
from saekit.errors import ConfigError, PluginFailedError, TrainingInterrupted
from saekit.pretrained.load import build_module
from saekit.protocols import Histogram
from saekit.sae import SAE, StepInput
from saekit.sae.init import initialize
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.firing import FiringStatistics
from saekit.training.metrics import eval_metrics
from saekit.training.optimizer import Optimizer
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer

D_IN, D_SAE = 12, 40
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]
DOCUMENTS = [{"tokens": [(7 * n + t) % 120 + 1 for t in range(20 + n % 13)]} for n in range(100)]


def rows(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def make_trainer(
    tokens: int = 1000,
    batch: int = 100,
    *,
    device: str = "cpu",
    asleep: int = 0,
    optimizer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    **sae: Any,
) -> SAETrainer:
    """A trainer of an SAE of which ``asleep`` features never fire."""
    plugins = saekit.default_manager()
    options = StandardConfig(**{"d_sae": D_SAE, "dtype": "float64", "l1_coefficient": 0.5, **sae})
    module = build_module(plugins.find("sae_architectures", options), options, D_IN, plugins)
    initialize(dict(module.named_parameters()), module.config, torch.Generator().manual_seed(0))
    module.b_enc.data[:asleep] = -30
    module.to(device)
    config = TrainingConfig(
        **{
            "training_tokens": tokens, "train_batch_size_tokens": batch, "lr": 0.01, "log_frequency": 1,
            "device": device, "dead_feature_window": 2, "feature_sampling_window": 3, **(training or {}),
        }
    )  # fmt: skip
    if config.finetuning_method is not None:
        module.add_scaling_factor()
    if config.compile:
        module.compile_losses(config.compile_mode)
    schedule = ComposedSchedule(
        config, lambda steps: plugins.build("lr_schedules", "constant", lr=config.lr, steps=steps)
    )
    return SAETrainer(
        name="sae",
        sae=module,
        site=saekit.Site(),
        optimizer=Optimizer(module.named_parameters(), OptimizerConfig(**(optimizer or {})), schedule),
        firing=FiringStatistics(
            D_SAE, dead_after=config.dead_feature_window, window=config.feature_sampling_window, device=device
        ),
        generator=torch.Generator(device).manual_seed(3),
        device=device,
        training=config,
    )


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.sae.named_parameters()}


def fit(trainer: SAETrainer, x: Tensor | None = None) -> list[dict[str, Any]]:
    x = rows(trainer.training.total_tokens) if x is None else x
    return [trainer.train_on(batch) for batch in x.split(trainer.training.train_batch_size_tokens)]


def fake_run(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run on :class:`FakeBackend`, which takes a moment."""
    config = run_config(
        folder,
        model={"backend": "test:fake"},
        site={"hook_name": "blocks.0.hook_resid_post"},
        evals={"run": [], "split": None},
    )
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    return config


def fakes(*others: object) -> saekit.PluginManager:
    backend = FakeBackend()
    return isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: backend), *others, builtins=True
    )


def train(config: dict[str, Any], *plugins: object) -> saekit.TrainResult:
    return saekit.train(config, plugins=fakes(*plugins), dataset=DOCUMENTS)


# ---- gradient clip


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from([0.0, 0.1, 1.0, 7.5]), st.sampled_from(["float32", "float64"]))
def test_clipping_is_torchs(size: float, clip: float, dtype: str) -> None:
    generator = torch.Generator().manual_seed(int(size * 1000))
    own, theirs = (
        [nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in ((4, 7), (7,), (7, 4))]
        for _ in range(2)
    )
    unused = nn.Parameter(torch.zeros(3, dtype=getattr(torch, dtype)))  # has no gradient
    named = [(str(number), parameter) for number, parameter in enumerate([*own, unused])]
    optimizer = Optimizer(named, OptimizerConfig(clip_grad_norm=clip, eps=1.0), lambda step: 0.5)
    adam = torch.optim.Adam(theirs, lr=0.5, betas=(0.0, 0.999), eps=1.0)
    total = 0.0
    for a, b in zip(own, theirs, strict=True):
        a.grad = (torch.randn(a.shape, generator=generator) * size).to(a)
        b.grad = a.grad.clone()
        total += a.grad.double().pow(2).sum().item()
    norm = optimizer.step(0)
    assert norm.item() == pytest.approx(math.sqrt(total), rel=1e-5), "the norm before clipping"
    if clip:
        assert nn.utils.clip_grad_norm_(theirs, clip).item() == pytest.approx(norm.item(), rel=1e-6)
    adam.step()
    for a, b in zip(own, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-12)
        assert a.grad is None, "it is freed"
    assert not unused.any()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_logged_norm_is_that_of_the_projected_gradient_before_clipping(normalize: bool) -> None:
    options = {"normalize_sae_decoder": normalize}
    first, second, third = (make_trainer(optimizer={"clip_grad_norm": clip}, **options) for clip in (1e-3, 0.0, 1e9))
    x = rows(100)
    first.sae.training_step(x, StepInput(step=0, generator=torch.Generator()))
    first.sae.before_update()
    expected = math.sqrt(sum(parameter.grad.pow(2).sum().item() for parameter in first.sae.parameters()))
    assert expected > 1
    for trainer in (second, third, first):
        trainer.sae.zero_grad(set_to_none=True)
        assert trainer.train_on(x)["details/grad_norm"] == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(second.sae.parameters(), third.sae.parameters(), strict=True))


# ---- firing statistics


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_firing_statistics_of_batches_of_any_size(seed: int, window: int, dead_after: int) -> None:
    drawn = np.random.default_rng(seed)
    firing = FiringStatistics(6, dead_after=dead_after, window=window, device="cpu")
    seen: list[np.ndarray] = []
    last_fired = np.full(6, -1)
    for step in range(14):
        active = drawn.random((int(drawn.integers(1, 9)), 6)) < 0.15
        seen.append(active)
        last_fired[active.any(0)] = step
        ended = firing.update(torch.tensor(active.sum(0)), rows=len(active))
        assert ended == (len(seen) == window)
        assert firing.since_fired.tolist() == (step - last_fired).tolist()
        assert firing.dead().tolist() == (step - last_fired > dead_after).tolist()
        if ended:
            whole = np.concatenate(seen).mean(0)
            assert firing.last_fractions.numpy() == pytest.approx(whole, rel=1e-6)
            assert firing.log_sparsity().numpy() == pytest.approx(np.log10(whole + 1e-10), rel=1e-5, abs=1e-9)
            seen.clear()
        elif seen:
            assert firing.fractions().numpy() == pytest.approx(np.concatenate(seen).mean(0), rel=1e-6)


# ---- metrics


def counts(histogram: Any) -> int:
    assert isinstance(histogram, Histogram)
    assert len(histogram.edges) == len(histogram.counts) + 1
    return sum(histogram.counts)


@pytest.mark.parametrize("l1", [0.5, 0.0])
@pytest.mark.parametrize("ghosts", [False, True])
def test_every_metric_is_what_it_is_called(l1: float, ghosts: bool) -> None:
    trainer = make_trainer(
        1130, asleep=5, use_ghost_grads=ghosts, l1_coefficient=l1, l1_warm_up_steps=4, normalize_sae_decoder=False
    )
    seen = 0
    last_fired = np.full(D_SAE, -1)
    window: list[np.ndarray] = []
    for step, batch in enumerate(rows(1130).split(100)):
        p = {name: value.numpy() for name, value in weights(trainer).items()}
        dead_before = trainer.firing.dead().numpy()
        metrics = trainer.train_on(batch)
        x = batch.numpy()
        f = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
        residual = x - f @ p["W_dec"] - p["b_dec"]
        variance = ((x - x.mean(0)) ** 2).sum(1)
        seen += len(x)
        last_fired[(f > 0).any(0)] = step
        window.append(f > 0)
        mse, penalty = (residual**2).sum(1).mean(), f.sum(1).mean()
        ghost = metrics["losses/ghost_grad_loss"]
        assert (ghost > 0) == (ghosts and bool(dead_before.any()))
        lam = l1 * min(1, step / 4)
        expected = {
            "losses/mse_loss": mse,
            "losses/l1_loss": penalty,  # before λ
            "losses/ghost_grad_loss": ghost,
            "losses/overall_loss": mse + lam * penalty + ghost,
            "metrics/explained_variance": 1 - (residual**2).sum() / variance.sum(),
            "metrics/explained_variance_std": (1 - (residual**2).sum(1) / variance).std(),
            "metrics/l0": (f > 0).sum() / len(x),
            "sparsity/mean_passes_since_fired": (step - last_fired).mean(),
            "sparsity/dead_features": (step - last_fired > 2).sum(),
            "details/current_learning_rate": 0.01,
            "details/current_l1_coefficient": lam,
            "details/n_training_tokens": seen,
            "details/grad_norm": metrics["details/grad_norm"],  # has a test of its own
        }
        if len(window) == 3:
            fractions = np.concatenate(window).mean(0)
            density = metrics.pop("plots/feature_density_line_chart")
            assert counts(density) == D_SAE
            logs = np.log10(fractions + 1e-10)
            assert density.edges[0] == pytest.approx(logs.min(), abs=1e-5)
            assert density.edges[-1] == pytest.approx(logs.max(), abs=1e-5)
            expected |= {
                "metrics/mean_log10_feature_sparsity": logs.mean(),
                "sparsity/below_1e-5": (fractions < 1e-5).sum(),
                "sparsity/below_1e-6": (fractions < 1e-6).sum(),
            }
            window.clear()
        assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6, abs=1e-12)
    assert last_fired[:5].tolist() == [-1] * 5 or ghosts
    assert seen == 1130


def test_features_that_fire_hardly_ever_are_told_apart() -> None:
    from saekit.training.metrics import window_metrics

    found = window_metrics(torch.tensor([0.0, 5e-7, 2e-6, 9e-6, 2e-5, 0.5]))
    assert (found["sparsity/below_1e-5"], found["sparsity/below_1e-6"]) == (4, 2)
    assert counts(found["plots/feature_density_line_chart"]) == 6
    assert found["metrics/mean_log10_feature_sparsity"] == pytest.approx(
        np.mean(np.log10(np.array([0.0, 5e-7, 2e-6, 9e-6, 2e-5, 0.5]) + 1e-10)), rel=1e-5
    )


def test_metrics_come_when_they_are_asked_for() -> None:
    trainer = make_trainer(1030, training={"log_frequency": 4, "feature_sampling_window": 6})
    found = fit(trainer)
    logged = [step for step, metrics in enumerate(found, 1) if "losses/mse_loss" in metrics]
    assert logged == [1, 4, 8, 11], "the first, every fourth and the last"
    windows = [step for step, metrics in enumerate(found, 1) if "metrics/mean_log10_feature_sparsity" in metrics]
    assert windows == [6]


def test_evals_log_what_dashboards_look_for_and_the_weights() -> None:
    sae = make_trainer(normalize_sae_decoder=False).sae
    sae.b_enc.data = torch.linspace(-1, 2, D_SAE).double()
    found = eval_metrics(sae, {"ce_recovered": 0.5, "l2_norm_out": 3.0, "l0": 2.0})
    norms, biases = found.pop("weights/W_dec_norms"), found.pop("weights/b_e")
    assert counts(norms) == counts(biases) == D_SAE
    actual = sae.W_dec.detach().norm(dim=1)
    assert (norms.edges[0], norms.edges[-1]) == pytest.approx((actual.min().item(), actual.max().item()))
    assert (biases.edges[0], biases.edges[-1]) == pytest.approx((-1, 2))
    assert found == {
        "evals/ce_recovered": 0.5, "evals/l2_norm_out": 3.0, "evals/l0": 2.0, "metrics/CE_loss_score": 0.5,
        "metrics/l2_norm": 3.0,
    }  # fmt: skip


def test_histograms_reach_the_file(tmp_path: Path) -> None:
    result = train(
        fake_run(
            tmp_path,
            sae={"l1_coefficient": 0},
            training={"feature_sampling_window": 4},
            evals={"run": ["reconstruction"], "every_n_steps": 4},
        )
    )
    found = {line["step"]: line for line in lines(result.folder) if "weights/b_e" in line}
    assert list(found) == [4, 8]
    for line in found.values():
        assert sum(line["weights/b_e"]["counts"]) == sum(line["weights/W_dec_norms"]["counts"]) == 64
    density = [line for line in lines(result.folder) if "plots/feature_density_line_chart" in line]
    assert [line["step"] for line in density] == [4, 8]
    assert all(sum(line["plots/feature_density_line_chart"]["counts"]) == 64 for line in density)
    assert all(line["losses/ghost_grad_loss"] == 0 for line in lines(result.folder) if "losses/mse_loss" in line)


# ---- autocast


class Products(TorchDispatchMode):
    """The types of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.dtypes += [arg.dtype for arg in args if isinstance(arg, Tensor) and arg.ndim == 2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"use_ghost_grads": True, "noise_scale": 0.1, "lp_norm": 2.0}], ids=str)
def test_autocast_runs_the_products_in_bfloat16(device: str, options: dict[str, Any]) -> None:
    runs = {}
    for autocast in (False, True):
        trainer = make_trainer(
            2000, device=device, asleep=4, dtype="float32", training={"autocast": autocast}, **options
        )
        with Products() as products:
            metrics = fit(trainer)
        wanted = torch.bfloat16 if autocast else torch.float32
        if trainer.sae.kernels == "reference" or autocast:
            assert len(products.dtypes) >= 2 * 5 * 20, "forward and backward, in every step"
        assert set(products.dtypes) == {wanted}
        for name, value in trainer.sae.named_parameters():
            assert value.dtype == torch.float32, name
        for name, state in trainer.optimizer.state_dict().items():
            assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}, name
        runs[autocast] = (weights(trainer), metrics[-1])
    assert runs[True][1]["losses/overall_loss"] == pytest.approx(runs[False][1]["losses/overall_loss"], rel=0.02)
    assert runs[True][1]["losses/overall_loss"] != runs[False][1]["losses/overall_loss"]
    for name, value in runs[False][0].items():
        moved = (value - dict(make_trainer(asleep=4, dtype="float32").sae.named_parameters())[name].to(device)).norm()
        assert (value - runs[True][0][name]).norm() < 0.2 * moved, name


def test_autocast_in_a_run_is_the_saes_alone(tmp_path: Path) -> None:
    """The model's products stay as they are, and evals and the saved weights are float32."""
    asked: list[bool] = []

    class Watched(FakeBackend):
        def activations(self, tokens: Tensor, hooks: Any) -> dict[str, Tensor]:
            asked.append(torch.is_autocast_enabled("cpu"))
            return super().activations(tokens, hooks)

    seen: list[tuple[bool, torch.dtype]] = []

    def build(config: object) -> Any:
        def watched(pre: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), pre.dtype))
            return pre.relu()

        return watched

    backend = Watched()
    plugins = isolated_manager(
        fake_plugin("model_backends", build=lambda config, **services: backend),
        fake_plugin("activation_functions", "watched", build=build),
        builtins=True,
    )
    config = fake_run(
        tmp_path, sae={"activation": "watched"}, training={"autocast": True}, evals={"run": ["reconstruction"]}
    )
    result = saekit.train(config, plugins=plugins, dataset=DOCUMENTS)
    assert asked
    assert not any(asked)
    steps = len([line for line in lines(result.folder) if "losses/mse_loss" in line])
    assert [autocast for autocast, _ in seen[:steps]] == [True] * steps
    assert seen[steps:], "the eval"
    assert not any(autocast for autocast, _ in seen[steps:])
    assert result.sae.W_enc.dtype == torch.float32


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

    def stopping(trainer: SAETrainer, batch: Tensor) -> Any:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batch)

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("options", [*COMPILED, {"normalize_sae_decoder": False, "lp_norm": 0.5}], ids=str)
def test_a_gpu_gives_the_cpus_numbers(device: str, options: dict[str, Any]) -> None:
    """But for noise, which each device draws in its own way."""
    options = {**options, "noise_scale": 0.0}
    on_cpu, on_gpu = make_trainer(asleep=6, **options), make_trainer(asleep=6, device=device, **options)
    for one, other in zip(fit(on_gpu), fit(on_cpu), strict=True):
        for metrics in (one, other):
            metrics.pop("plots/feature_density_line_chart", None)
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    noisy = [make_trainer(device=device, noise_scale=0.3) for _ in range(2)]
    for trainer in noisy:
        fit(trainer)
    for name, value in weights(noisy[0]).items():
        assert torch.equal(value, weights(noisy[1])[name]), name


# ---- seeds


def drawing(kind: str, name: str, drawn: list[tuple[float, float, float]], **entry: Any) -> object:
    """A plugin that draws from the process's generators: when it is built, and whenever it is used."""

    def draw() -> None:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))

    def build(config: object, **services: Any) -> Any:
        draw()
        if kind == "activation_functions":
            return lambda pre: (draw(), pre.relu())[1]
        if kind == "evals":
            return lambda sae, **services: (draw(), {"drawn": drawn[-1][0]})[1]
        return lambda step: (draw(), 1e-3)[1]

    return fake_plugin(kind, name, build=build, **entry)


def states() -> tuple[Any, Any, Any]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_plugins_that_draw_from_the_processs_generators(tmp_path: Path) -> None:
    """Each of Python's, NumPy's and torch's is seeded, for as long as a run lasts."""

    def run(seed: int) -> tuple[list[tuple[float, float, float]], dict[str, str]]:
        drawn: list[tuple[float, float, float]] = []
        config = fake_run(
            tmp_path,
            sae={"activation": "drawing"},
            evals={"run": ["drawing-eval"], "every_n_steps": 3},
            training={"seed": seed},
        )
        random.seed(len(drawn_before)), np.random.seed(len(drawn_before)), torch.manual_seed(len(drawn_before))
        before = states()
        result = train(
            config,
            drawing("activation_functions", "drawing", drawn),
            drawing("evals", "drawing-eval", drawn),
        )
        assert states() == before, "the caller's are given back"
        drawn_before.append(seed)
        return drawn, hashes(result.folder)

    drawn_before: list[int] = []
    one, again, other = run(1), run(1), run(2)
    assert len(one[0]) > 12
    assert one == again
    for generator in range(3):
        draws = [[found[generator] for found in drawn] for drawn, _ in (one, other)]
        assert not set(draws[0]) & set(draws[1])
        assert len(set(draws[0])) == len(draws[0])


def test_the_callers_generators_come_back_after_an_error(tmp_path: Path) -> None:
    def build(config: object) -> Any:
        return lambda sae, **services: exec("import random; random.random(); raise RuntimeError('an eval broke')")

    before = states()
    with pytest.raises(PluginFailedError, match="an eval broke"):
        train(fake_run(tmp_path, evals={"run": ["bad"]}), fake_plugin("evals", "bad", build=build))
    assert states() == before


def test_an_architecture_that_draws_its_own_tensors(tmp_path: Path) -> None:
    """When it is built, as torch's layers do: the same from one seed, alone or beside another."""

    @attrs.frozen(kw_only=True)
    class MixedConfig(StandardConfig):
        pass

    def build(config: Any, *, d_in: int, activation: Any) -> SAE:
        plain = (
            saekit.default_manager()
            .find("sae_architectures", "standard")
            .entry.build(config, d_in=d_in, activation=activation)
        )
        plain.mixing = nn.Parameter(nn.Linear(d_in, d_in).weight.detach())
        return plain

    mixed = fake_plugin("sae_architectures", "mixed", build=build, config=MixedConfig)

    def config(seed: int, l1: float) -> dict[str, Any]:
        return fake_run(tmp_path, training={"seed": seed}) | {
            "sae": {"name": "mixed", "d_sae": 64, "l1_coefficient": l1}
        }

    found = []
    for caller, seed in enumerate((1, 1, 2)):
        torch.manual_seed(caller)
        found.append(train(config(seed, 1.0), mixed).sae)
    assert torch.equal(found[0].mixing, found[1].mixing)
    assert not torch.equal(found[0].mixing, found[2].mixing)
    together = saekit.train([config(1, 3.0), config(1, 1.0)], plugins=fakes(mixed), dataset=DOCUMENTS)
    _, second = together.results.values()
    assert torch.equal(second.sae.mixing, found[0].mixing)
    assert torch.equal(second.sae.W_enc, found[0].W_enc)


def test_a_backend_that_draws_its_weights(tmp_path: Path) -> None:
    def build(config: object, **services: Any) -> FakeBackend:
        backend = FakeBackend()
        backend._weights = torch.randn(backend.d_vocab, backend.d_model)
        return backend

    def run(seed: int) -> Tensor:
        torch.manual_seed(random.randrange(10**6))
        plugins = isolated_manager(fake_plugin("model_backends", build=build), builtins=True)
        config = fake_run(tmp_path, training={"seed": seed})
        return saekit.train(config, plugins=plugins, dataset=DOCUMENTS).sae.W_enc

    one, again, other = run(1), run(1), run(2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_options_reach_the_run(tmp_path: Path) -> None:
    """Every option of the standard SAE's loss changes what is learned, so none is lost on the way."""
    plain = {"normalize_sae_decoder": False}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "noise": {"noise_scale": 0.5},
        "norm": {"lp_norm": 0.5},
        "dense_batch": {"mse_loss_normalization": "dense_batch"},
        "weighted": {"scale_sparsity_penalty_by_decoder_norm": True},
        "ghosts": {"use_ghost_grads": True},
        "warm-up": {"l1_warm_up_steps": 5},
        "input": {"apply_b_dec_to_input": False},
        "tanh": {"activation": "tanh-relu"},
        "unit": {"normalize_sae_decoder": True},
        "orthogonal": {"decoder_orthogonal_init": True},
        "heuristic": {"decoder_heuristic_init": True},
        "transpose": {"init_encoder_as_decoder_transpose": True},
        "mean": {"b_dec_init_method": "mean"},
        "median": {"b_dec_init_method": "geometric_median"},
        "float64": {"dtype": "float64"},
    }
    # On batches so small that many a feature does not fire.
    training = {"training_tokens": 60, "train_batch_size_tokens": 3, "dead_feature_window": 1}
    found = {}
    for name, change in changes.items():
        result = train(fake_run(tmp_path, sae=plain | change, training=training))
        found[name] = hashes(result.folder)["sae_weights.safetensors"]
        options = json.loads((result.folder / "sae/cfg.json").read_text())["saekit"]["options"]
        for option, value in change.items():
            assert options[option] == (f"saekit:{value}" if option == "activation" else value)
    assert not [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
