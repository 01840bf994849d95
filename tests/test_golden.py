"""The reference's own numbers: thirty steps of sae-lens 3.0.0 in float64, one option changed per file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from saekit_plugins.cosine import CosineConfig
from saekit_plugins.cosine_restarts import CosineRestartsConfig
from saekit_plugins.standard import StandardConfig
from safetensors import safe_open

import saekit
from saekit.config import OptimiserConfig, TrainingConfig
from saekit.pretrained.load import build_module
from saekit.sae.init import initial_b_dec
from saekit.site import Site
from saekit.training.firing import FiringStatistics
from saekit.training.optimiser import Optimiser
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
TRACED = {
    "loss": "losses/overall_loss",
    "mse_loss": "losses/mse_loss",
    "l0": "metrics/l0",
    "lr": "details/current_learning_rate",
    "l1_coefficient": "details/current_l1_coefficient",
    "grad_norm": "details/grad_norm",
}


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return json.loads(metadata["config"]) | {
        "scaled": metadata["scale_sparsity_penalty_by_decoder_norm"] == "true"
    }, tensors


def schedule_of(config: dict) -> object:
    name = config["lr_scheduler_name"]
    if name == "cosineannealing":
        return CosineConfig(end=config["lr_end"])
    if name == "cosineannealingwarmrestarts":
        return CosineRestartsConfig(end=config["lr_end"], n_restart_cycles=config["n_restart_cycles"])
    return name


def trainer_of(config: dict, init: dict[str, torch.Tensor]) -> SAETrainer:
    plugins = saekit.default_manager()
    options = StandardConfig(
        d_sae=config["d_sae"],
        activation=config["activation_fn"],
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
        dtype="float64",
        normalize_sae_decoder=config["normalize_sae_decoder"],
        l1_coefficient=config["l1_coefficient"],
        l1_warm_up_steps=config["l1_warm_up_steps"],
        lp_norm=float(config["lp_norm"]),
        scale_sparsity_penalty_by_decoder_norm=config["scaled"],
        mse_loss_normalization=config["mse_loss_normalization"] or "none",
        noise_scale=config["noise_scale"],
        use_ghost_grads=config["use_ghost_grads"],
    )
    sae = build_module(plugins.find("sae_architectures", options), options, config["d_in"], plugins)
    sae.load_public_tensors(init)
    training = TrainingConfig(
        training_tokens=config["training_tokens"],
        train_batch_size_tokens=config["train_batch_size_tokens"],
        lr=config["lr"],
        lr_warm_up_steps=config["lr_warm_up_steps"],
        lr_decay_steps=config["lr_decay_steps"],
    )
    choice = schedule_of(config)
    schedule = ComposedSchedule(
        training, lambda steps: plugins.build("lr_schedules", choice, lr=training.lr, steps=steps)
    )
    return SAETrainer(
        sae=sae,
        site=Site(hook_name=config["hook_name"]),
        optimiser=Optimiser(
            sae.parameters(), OptimiserConfig(beta1=config["adam_beta1"], beta2=config["adam_beta2"]), schedule
        ),
        firing=FiringStatistics(
            config["d_sae"],
            dead_after=config["dead_feature_window"],
            window=config["feature_sampling_window"],
            device="cpu",
        ),
        generator=torch.Generator(),
        device="cpu",
        log_frequency=1,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_thirty_steps_equal_the_reference(path: Path) -> None:
    config, tensors = read(path)
    init = {name.removeprefix("init."): value for name, value in tensors.items() if name.startswith("init.")}
    trainer = trainer_of(config, init)
    worst = 0.0
    for step, batch in enumerate(tensors["batches"]):
        dead = float(trainer.firing.dead().sum())  # the trace holds the count that the step was given
        metrics = trainer.train_on(batch)
        metrics["dead"] = dead
        metrics["weighted l1"] = metrics["losses/l1_loss"] * metrics["details/current_l1_coefficient"]
        for name, key in [*TRACED.items(), ("l1_loss", "weighted l1"), ("dead_features", "dead")]:
            expected = tensors[f"trace.{name}"][step].item()
            assert metrics[key] == pytest.approx(expected, rel=1e-9, abs=1e-9), f"{name} at step {step}"
            worst = max(worst, abs(metrics[key] - expected) / max(abs(expected), 1))
    for name, value in trainer.sae.public_tensors().items():
        difference = (value - tensors[f"final.{name}"]).abs().max().item()
        assert difference < 1e-9, name
        worst = max(worst, difference)
    print(f"largest deviation {worst:.1e}")


def test_there_are_golden_files() -> None:
    assert len(FILES) == 15


@pytest.mark.parametrize("method", ["mean", "geometric_median"])
def test_initial_b_dec_is_the_references_kind(method: str) -> None:
    """The file does not hold the buffer that the reference averaged, so check against the definition."""
    points = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    found = initial_b_dec(method, points, 5)
    if method == "mean":
        assert torch.allclose(found, points.sum(0) / 200)
    else:
        objective = lambda m: (points - m).norm(dim=1).sum()  # noqa: E731
        nudges = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-3
        assert all(objective(found) <= objective(found + nudge) for nudge in nudges)
