"""Firing statistics and metrics, each against its definition."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import D_SAE, counts, fake_run, fit, lines, make_trainer, rows, train, weights

from saekit.errors import PluginError
from saekit.training.firing import FiringStatistics
from saekit.training.metrics import apart, eval_metrics, step_metrics, weight_metrics, window_metrics
from saekit.values import Ports, StepOutput

pytestmark = pytest.mark.usefixtures("way")


# ---- firing statistics


@settings(max_examples=40)
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
    found = eval_metrics({"ce_recovered": 0.5, "l2_norm_out": 3.0, "l0": 2.0})
    weights = weight_metrics(sae)
    norms, biases = weights.pop("weights/W_dec_norms"), weights.pop("weights/b_e")
    assert counts(norms) == counts(biases) == D_SAE
    actual = sae.W_dec.detach().norm(dim=1)
    assert (norms.edges[0], norms.edges[-1]) == pytest.approx((actual.min().item(), actual.max().item()))
    assert (biases.edges[0], biases.edges[-1]) == pytest.approx((-1, 2))
    assert not weights
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


class Elsewhere(torch.Tensor):
    """On a device, which every look waits for."""

    looks = 0

    def cpu(self, *args: Any) -> torch.Tensor:
        Elsewhere.looks += 1
        return self.as_subclass(torch.Tensor)

    def item(self) -> float:
        raise AssertionError("a look at one number")


def test_the_metrics_of_a_window_take_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "looks", 0)
    fractions = torch.tensor([0.0, 0.5, 2e-6])
    assert window_metrics(fractions.as_subclass(Elsewhere)) == window_metrics(fractions)
    assert Elsewhere.looks == 1


def test_numbers_of_several_evals_are_one_table_unless_names_meet() -> None:
    assert apart({"one": {"a": 1.0}, "other": {"b": 2.0}}) == {"a": 1.0, "b": 2.0}
    assert apart({"one": {"n": 2.0, "a": nan}, "other": {"n": 2.0, "a": nan}})["n"] == 2, "they say the same"
    assert apart({"one": {"n": 0.1234}, "other": {"n": 0.123401}}) == {"n": 0.1234}, "but for rounding"
    told = "the evals 'one' and 'other' both give a number 'a', 0.1234 and 0.12345, and one would"
    with pytest.raises(PluginError, match=told):
        apart({"one": {"a": 0.1234}, "other": {"a": 0.12345}})


@pytest.mark.parametrize("n", [3, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_explain_no_variance_whatever_their_mean_is_rounded_to(n: int, dtype: torch.dtype) -> None:
    drawn = torch.randn(8, generator=torch.Generator().manual_seed(0))
    target = drawn.to(dtype).repeat(n, 1)
    if dtype == torch.float32:
        assert n < 7 or (target != target.mean(0)).any(), "rounding is left, which is no variance"
    output = torch.zeros_like(target)
    step = StepOutput(loss=output.sum(), losses={}, output=output, fired=torch.ones(3))
    given = {"since_fired": torch.zeros(3), "dead": torch.zeros(3), "lr": 1.0, "grad_norm": output.sum(), "tokens": 1}
    found = step_metrics(target, step, ports=Ports.one(8), **given)
    assert not [name for name in found if "explained" in name]
    target[1, 2] *= 2
    assert "metrics/explained_variance" in step_metrics(target, step, ports=Ports.one(8), **given)


def test_a_batch_of_one_row_explains_no_variance_and_says_nothing_of_it() -> None:
    row = torch.ones(1, 4)
    step = StepOutput(loss=row.sum(), losses={}, output=row * 2, fired=torch.ones(3))
    given = {"since_fired": torch.zeros(3), "dead": torch.zeros(3), "lr": 1.0, "grad_norm": row.sum(), "tokens": 1}
    ports = Ports.one(4)
    found = step_metrics(row, step, ports=ports, **given)
    assert not [name for name in found if "explained" in name]
    assert found["metrics/l0"] == 3
    other = StepOutput(loss=row.sum(), losses={}, output=torch.zeros(2, 4), fired=torch.ones(3))
    two = step_metrics(torch.eye(2, 4), other, ports=ports, **given)
    assert two["metrics/explained_variance"] == -1
