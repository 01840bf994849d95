"""Trainers of small SAEs, runs on the fake model, and what they leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.optimizers import adam_for
from support.tiny import run_config
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import TrainingConfig
from saekit.sae.build import build_module, initialize
from saekit.testing import FakeBackend, fake_plugin, isolated_manager
from saekit.training.firing import FiringStatistics
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "sae").iterdir())}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


D_IN, D_SAE = 12, 40
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
    initialize(module, torch.Generator().manual_seed(0))
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
        sites=saekit.Sites.one(saekit.Site()),
        optimizer=adam_for(module.named_parameters(), schedule, **(optimizer or {})),
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


def counts(histogram: Any) -> int:
    assert isinstance(histogram, Histogram)
    assert len(histogram.edges) == len(histogram.counts) + 1
    return sum(histogram.counts)


TUNING = {
    "training_tokens": 1000,  # ends within the fourth batch of 256, which is trained on as the others
    "finetuning_tokens": 700,
    "lr": 0.01,
    "dead_feature_window": 1,
}


@attrs.frozen
class Step:
    """A step of a run: what it was given, what it changed and what it reported."""

    sae: SAE
    x: Tensor
    """As the SAE sees it."""
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    metrics: dict[str, Any]


FACTOR = torch.linspace(0.5, 2, 10)
