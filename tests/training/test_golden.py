"""The reference's own numbers: thirty steps of sae-lens 3.0.0 in float64, with one option or several changed per file.

Run with ``-rP`` to see each case's largest deviation.  ``make_golden.py`` made the mixed cases.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.golden import FILES, TRACED, Golden, options_of, read
from support.optimizers import adam_for
from torch import Tensor

import saekit
from saekit.config import TrainingConfig
from saekit.data.normalize import activation_scale
from saekit.sae.build import build_module
from saekit.sae.init import initial_b_dec
from saekit.site import Site, Sites
from saekit.training.firing import FiringStatistics
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer

pytestmark = pytest.mark.usefixtures("way")

TOLERANCE = 1e-9
ONE_OPTION = {
    "b_dec_geometric_median", "b_dec_mean", "beta1_zero", "dense_batch", "l1_warmup", "lp_half", "lr_cosine_warmup",
    "lr_restarts", "lr_warmup_decay", "no_b_dec_to_input", "orthogonal_init", "plain", "strong_clip", "tanh_relu",
    "transpose_init",
}  # fmt: skip
MIXED = {
    "mixed_cosine_decay_no_b_dec_lp_two_dead",
    "mixed_dense_batch_lp_half_l1_warmup_cosine_warmup",
    "mixed_finetune_decoder_normalized_decoder",
    "mixed_finetune_decoder_tanh_relu_dense_batch_decay",
    "mixed_finetune_scale_cosine_warmup_l1_warmup",
    "mixed_finetune_unrotated_decoder_ghost",
    "mixed_ghost_dense_batch_tanh_relu_cosine_beta1_zero",
    "mixed_ghost_lr_warmup_l1_warmup",
    "mixed_long_warmups_cosine_to_zero",
    "mixed_median_transpose_orthogonal_l1_warmup_decay",
    "mixed_normalized_activations_mean_orthogonal",
    "mixed_normalized_decoder_beta1_zero_l1_warmup",
    "mixed_normalized_decoder_ghost_dense_batch_no_b_dec_restarts",
    "mixed_tanh_relu_lp_two_dense_batch_restarts",
    "mixed_tanh_relu_no_b_dec_restarts_decay_strong_clip_beta1_zero",
}


def trainer_of(golden: Golden) -> SAETrainer:
    options, plugins = options_of(golden), saekit.default_manager()
    own = StandardConfig(**options.sae)
    sae = build_module(plugins.find("sae_architectures", own), own, options.d_in, plugins)
    training = TrainingConfig(**options.training)
    if training.finetuning_method is not None:
        sae.add_scaling_factor()
    sae.load_public_tensors(golden.part("init."))
    schedule = ComposedSchedule(
        training,
        lambda steps: plugins.build("lr_schedules", options.lr_schedule, lr=training.lr, steps=steps),
    )
    return SAETrainer(
        name="golden",
        sae=sae,
        sites=Sites.one(Site(hook_name=options.hook_name)),
        optimizer=adam_for(sae.named_parameters(), schedule, **options.optimizer),
        firing=FiringStatistics(
            sae.d_sae, dead_after=training.dead_feature_window, window=training.feature_sampling_window, device="cpu"
        ),
        generator=torch.Generator(),
        device="cpu",
        training=training,
        scale=golden.activation_scale,
    )


class Deviations:
    """Relative to the expected value, or absolute where that is below 1."""

    def __init__(self) -> None:
        self.worst = 0.0

    def compare(self, what: str, found: float | Tensor, expected: float | Tensor, tolerance: float = TOLERANCE) -> None:
        found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
        assert found.shape == expected.shape, what
        deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
        assert deviation <= tolerance, f"{what} deviates by {deviation:.1e}"
        self.worst = max(self.worst, deviation)


@cache
def rounding_of_gradient_norms(path: Path) -> list[float]:
    """By how much each step's gradient norm is undetermined: what it changes by when weights change by their rounding.

    With p < 1 the gradient of a feature near zero has no bound: a sum in another order, of another processor, shows in
    the eighth digit.  The file has such digits itself, of the machine that made it.  The largest change of four runs,
    which are those of plain torch, whichever way is tried.
    """
    golden, norms = read(path), []
    for seed in (None, 0, 1, 2, 3):
        trainer, generator = trainer_of(golden), torch.Generator().manual_seed(seed or 0)
        trainer.sae.kernels = "reference"
        found = []
        for batch in golden.tensors["batches"]:
            if seed is not None:
                for weights in trainer.sae.parameters():
                    noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
                    weights.data.mul_(1 + torch.finfo(weights.dtype).eps * noise)
            found.append(float(trainer.train_on(batch)["details/grad_norm"]))
        norms.append(torch.tensor(found, dtype=torch.float64))
    exact, *others = norms
    return torch.stack([((other - exact) / exact).abs() for other in others]).amax(0).tolist()


@pytest.mark.parametrize("path", FILES.values(), ids=lambda path: path.stem)
def test_thirty_steps_equal_the_reference(path: Path) -> None:
    golden = read(path)
    trainer = trainer_of(golden)
    trace = golden.part("trace.")
    trace.pop("scaling_factor")
    undetermined = rounding_of_gradient_norms(path) if golden.config["lp_norm"] < 1 else None
    deviations = Deviations()
    for step, batch in enumerate(golden.tensors["batches"]):
        dead = float(trainer.firing.dead().sum())  # the trace holds the count that the step was given
        metrics: dict[str, Any] = {"losses/ghost_grad_loss": 0.0, **trainer.train_on(batch)}
        metrics["sparsity/dead_features"] = dead
        metrics["losses/l1_loss"] *= metrics["details/current_l1_coefficient"]
        for name, values in trace.items():
            tolerance = TOLERANCE
            if name == "grad_norm" and undetermined is not None:
                tolerance = min(max(TOLERANCE, undetermined[step]), 1e-7)
            deviations.compare(f"{name} at step {step}", metrics[TRACED[name]], values[step], tolerance)
    assert trainer.finished
    final = golden.part("final.")
    if golden.config["normalize_sae_decoder"]:  # the file holds the rows as the last update left them
        final["W_dec"] = final["W_dec"] / final["W_dec"].norm(dim=1, keepdim=True)
    found = {name: value.detach() for name, value in trainer.sae.named_parameters()}
    assert found.keys() == final.keys()
    for name, value in found.items():
        deviations.compare(name, value, final[name])
    print(f"{path.stem}: largest deviation {deviations.worst:.1e}")


def test_the_known_files_are_there() -> None:
    assert set(FILES) >= ONE_OPTION | MIXED


def test_cases_do_what_they_are_named_for() -> None:
    """Dead features, ghost losses and learned factors are there, so that their equality says something."""
    for path in FILES.values():
        golden = read(path)
        trace, init, final = golden.part("trace."), golden.part("init."), golden.part("final.")
        if golden.config["use_ghost_grads"]:
            assert ((trace["dead_features"] > 0) == (trace["ghost_grad_loss"] > 0)).all()
            assert (trace["ghost_grad_loss"] > 0).sum() >= 10
        if "finetuning_method" in golden.config:
            assert (init["scaling_factor"] == 1).all()
            assert (final["scaling_factor"] != 1).any()
        assert (trace["grad_norm"] > 1).any(), "clipping"


def test_an_option_that_is_not_understood_is_an_error() -> None:
    golden = read(next(iter(FILES.values())))
    with pytest.raises(AssertionError, match="does not understand: {'jump': 1}"):
        trainer_of(attrs.evolve(golden, config={**golden.config, "jump": 1}))
    with pytest.raises(AssertionError, match=r"noise_scale is not 0\.0"):
        trainer_of(attrs.evolve(golden, config={**golden.config, "noise_scale": 0.1}))


def rows_of(golden: Golden) -> Tensor:
    return golden.tensors["batches"].double().flatten(0, 1)


@pytest.mark.parametrize(
    "path", [path for path in FILES.values() if read(path).b_dec_from_batches], ids=lambda path: path.stem
)
def test_initial_b_dec_equals_the_reference(path: Path) -> None:
    golden = read(path)
    method, rows = golden.config["b_dec_init_method"], rows_of(golden)
    found = initial_b_dec(method, rows, rows.shape[1]) * golden.activation_scale
    # Both iterate until the sum of distances no longer changes, and that says no more of the median than this.
    tolerance = 1e-7 if method == "geometric_median" else TOLERANCE
    deviations = Deviations()
    deviations.compare("b_dec", found, golden.part("init.")["b_dec"], tolerance)
    print(f"b_dec by {method} of {path.stem}: deviation {deviations.worst:.1e}")


def test_activation_scale_equals_the_reference() -> None:
    """The reference estimates on a thousand batches, here the file's thirty over and over."""
    golden = read(Path(__file__).parents[1] / "golden" / "mixed_normalized_activations_mean_orthogonal.safetensors")
    batches = golden.tensors["batches"].double()
    found = activation_scale(torch.cat([batches[step % len(batches)] for step in range(1000)]))
    deviations = Deviations()
    deviations.compare("scale", found, golden.activation_scale)
    print(f"activation scale: deviation {deviations.worst:.1e}")


@pytest.mark.parametrize("method", ["mean", "geometric_median"])
def test_initial_b_dec_is_the_references_kind(method: str) -> None:
    """The one-option files do not hold the buffer that the reference averaged, so check against the definition."""
    points = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    found = initial_b_dec(method, points, 5)
    if method == "mean":
        assert torch.allclose(found, points.sum(0) / 200)
    else:
        objective = lambda m: (points - m).norm(dim=1).sum()  # noqa: E731
        nudges = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-3
        assert all(objective(found) <= objective(found + nudge) for nudge in nudges)
