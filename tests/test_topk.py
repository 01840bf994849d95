"""The architectures ``topk`` and ``batchtopk``, beside sae-lens 6.54.12: ``make_golden_topk.py`` made the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.batchtopk import BatchTopKConfig
from saekit_plugins.topk import TopKConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import saekit
from saekit.config import OptimiserConfig, SAEConfig, TrainingConfig
from saekit.pretrained.load import build_module
from saekit.sae import SAE, StepInput
from saekit.site import Site
from saekit.training.firing import FiringStatistics
from saekit.training.optimiser import Optimiser
from saekit.training.trainer import SAETrainer

FOLDER = Path(__file__).parent / "golden_topk"
CASES = sorted(path.stem for path in FOLDER.glob("*topk_*.safetensors"))


def built(config: SAEConfig, d_in: int) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, d_in, plugins)


def random_sae(kind: str, d_in: int = 12, d_sae: int = 40, seed: int = 0, **options: Any) -> SAE:
    """With decoder rows of many norms."""
    config = (TopKConfig if kind == "topk" else BatchTopKConfig)(**{"d_sae": d_sae, "dtype": "float64", **options})
    sae = built(config, d_in)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        sae.W_dec *= 0.1 + torch.rand(d_sae, 1, generator=generator) * 3
    return sae


def rows(n: int, d_in: int = 12, seed: int = 5) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step_input(dead: Tensor | None = None) -> StepInput:
    return StepInput(step=0, generator=torch.Generator(), dead=dead)


class Golden:
    def __init__(self, name: str) -> None:
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.batches = load_file(FOLDER / "batches.safetensors")["batches"].double()
        self.kind = name.split("_")[0]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def trainer(self) -> SAETrainer:
        config = dict(self.config)
        lr, beta1, window = config.pop("lr"), config.pop("adam_beta1"), config.pop("dead_feature_window")
        scale = 1.7 if config.pop("normalize_activations", None) else 1.0
        options = {"aux_loss_coefficient": 1.0} | {key.removeprefix("topk_"): value for key, value in config.items()}
        kind = TopKConfig if self.kind == "topk" else BatchTopKConfig
        sae = built(kind(d_sae=128, dtype="float64", **options), 32)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(self.part("init.")[name])
        training = TrainingConfig(
            training_tokens=self.batches.shape[0] * self.batches.shape[1], train_batch_size_tokens=64, lr=lr,
            dead_feature_window=window, log_frequency=1,
        )  # fmt: skip
        return SAETrainer(
            name="golden", sae=sae, site=Site(), training=training, generator=torch.Generator(), device="cpu",
            optimiser=Optimiser(sae.named_parameters(), OptimiserConfig(beta1=beta1), lambda step: lr),
            firing=FiringStatistics(128, dead_after=window, window=1000, device="cpu"), scale=scale,
        )  # fmt: skip


def close(found: float | Tensor, expected: float | Tensor, what: str = "") -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert found.shape == expected.shape, what
    deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
    assert deviation <= 1e-9, f"{what} deviates by {deviation:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_sae_lens(name: str) -> None:
    golden = Golden(name)
    trainer = golden.trainer()
    trace = golden.part("trace.")
    for step, batch in enumerate(golden.batches):
        dead = float(trainer.firing.dead().sum())
        metrics = trainer.train_on(batch)
        found = {
            "loss": metrics["losses/overall_loss"],
            "mse_loss": metrics["losses/mse_loss"],
            "auxiliary_reconstruction_loss": metrics["losses/auxiliary_reconstruction_loss"],
            "l0": metrics["metrics/l0"],
            "dead_features": dead,
        }
        if golden.kind == "batchtopk":
            found["topk_threshold"] = metrics["details/current_topk_threshold"]
        assert found.keys() == trace.keys()
        for key, value in found.items():
            close(value, trace[key][step], f"{key} at step {step}")
    for key, value in trainer.sae.named_parameters():
        close(value.detach(), golden.part("final.")[key], key)
    check_saved(trainer, golden)


def check_saved(trainer: SAETrainer, golden: Golden) -> None:
    """What is saved is what the peer saves, but that the running average has lost its start at zero."""
    sae = trainer.raw_sae()
    saved, expected = sae.public_tensors(), golden.part("saved.")
    x = golden.batches[0]
    if golden.kind == "batchtopk":
        lr = golden.config.get("topk_threshold_lr", 0.01)
        expected["threshold"] = expected["threshold"] / (1 - (1 - lr) ** len(golden.batches))
    else:
        with torch.no_grad():
            close(sae(x), golden.tensors["output"], "output")
            norms = sae.feature_norms()
            assert norms is None or (norms != 1).any()
            close(sae.encode(x), golden.tensors["features"], "features")
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        close(saved[key], value, f"saved {key}")


def test_cases_have_dead_features_fewer_and_more_than_auxk_trains() -> None:
    most = {name: Golden(name).part("trace.")["dead_features"].max().item() for name in CASES}
    assert sum(dead > 0 for dead in most.values()) >= 4
    assert max(most.values()) > 2 * 16, "k_aux"
    for name, dead in most.items():
        aux = Golden(name).part("trace.")["auxiliary_reconstruction_loss"]
        assert bool((aux > 0).any()) == (dead > 0)
