"""The recorded steps of other libraries' gated and Matryoshka SAEs: ``golden_levels/make_golden_levels.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.kernels import seeded
from support.optimizers import adam_for
from torch import Tensor

import saekit
from saekit import SAE
from saekit.config import SAEConfig, TrainingConfig
from saekit.sae.build import build_module
from saekit.training.firing import FiringStatistics
from saekit.training.trainer import SAETrainer
from saekit.values import StepInput

FOLDER = Path(__file__).parents[1] / "golden_levels"
LOSSES = Path(__file__).parents[1] / "fixtures/losses"
_TRAINING = ("lr", "adam_beta1", "dead_feature_window", "normalize_activations")


def built(config: SAEConfig, d_in: int = 16) -> SAE:
    plugins = saekit.default_manager()
    return build_module(plugins.find("sae_architectures", config), config, d_in, plugins)


class Recorded(FiringStatistics):
    """Those features are dead that were recorded to be."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__(masks.shape[1], dead_after=1, window=10**6, device="cpu")
        self.masks = masks

    def dead(self) -> Tensor:
        return self.masks[min(self._steps, len(self.masks) - 1)]


class Golden:
    """One recorded case.  ``names`` are its names of parameters, by ours, where they differ."""

    def __init__(self, name: str, names: dict[str, str] | None = None) -> None:
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.options: dict[str, Any] = json.loads(file.metadata()["config"])
        whole = load_file(FOLDER.with_name("golden_topk") / "batches.safetensors")["batches"]
        self.batches = whole[:, :48, :16].double().contiguous()
        self.names = names or {}
        self.training = {key: self.options.pop(key) for key in _TRAINING if key in self.options}

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def weight(self, when: str, name: str, like: Tensor) -> Tensor:
        value = self.tensors[f"{when}.{self.names.get(name, name)}"]
        return value if value.shape == like.shape else value.T

    def trainer(self, config: SAEConfig, **optimizer: Any) -> SAETrainer:
        sae = built(config)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(self.weight("init", name, parameter))
        lr, window = self.training.get("lr", 2e-3), self.training.get("dead_feature_window", 1000)
        masks = self.tensors.get("dead")
        firing = FiringStatistics(48, dead_after=window, window=1000, device="cpu")
        training = TrainingConfig(
            training_tokens=self.batches.shape[0] * 48, train_batch_size_tokens=48, lr=lr, log_frequency=1
        )
        return SAETrainer(
            name="golden", sae=sae, sites=saekit.Sites.one(saekit.Site()), training=training, generator=seeded(),
            device="cpu", firing=firing if masks is None else Recorded(masks),
            optimizer=adam_for(sae.named_parameters(), lambda step: lr, **optimizer),
            scale=1.7 if self.training.get("normalize_activations") else 1.0,
        )  # fmt: skip

    def check(self, trainer: SAETrainer, traced: dict[str, str]) -> dict[str, Tensor]:
        """All steps, of which ``traced`` says our names of what was recorded; returns the traces."""
        traces = self.part("trace.")
        for step, batch in enumerate(self.batches):
            metrics = trainer.train_on(batch)
            for ours, theirs in traced.items():
                close(metrics[ours], traces[theirs][step], f"{ours} at step {step}")
        for name, value in trainer.sae.named_parameters():
            close(value.detach(), self.weight("final", name, value), name)
        return traces


def close(found: Any, expected: Any, what: str = "") -> None:
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert found.shape == expected.shape, what
    deviation = ((found - expected).abs() / expected.abs().clamp_min(1)).max().item()
    assert deviation <= 1e-9, f"{what} deviates by {deviation:.1e}"


def stepped(
    sae: SAE, x: Tensor, dead: Tensor | None, way: str, step: int = 0, why: str = 'kernels is "reference"'
) -> tuple[Any, dict[str, Tensor]]:
    """A training step by a way, and the gradients that it leaves; ``why`` it goes by the reference, where it does."""
    sae.kernels = way  # type: ignore[assignment]
    assert sae.why_reference() == (None if way == "fast" else why)
    result = sae.training_step(x, StepInput(step=step, generator=seeded(), dead=dead))
    found = {name: value.grad for name, value in sae.named_parameters() if value.grad is not None}
    for value in sae.parameters():
        value.grad = None
    return result, found


def check_loss(
    config: SAEConfig,
    name: str,
    names: dict[str, str],
    way: str,
    *,
    reset: bool = False,
    single: bool = False,
    **others: Any,
) -> Any:
    """One recorded loss with its gradients; ``reset``: what fires in the batch is not dead.

    ``single``: the peer computes AuxK in float32, and the rest in float64.
    """
    of_loss, of_gradients = (2e-10, 1e-10) if single else (1e-12, 1e-12)
    theirs = load_file(LOSSES / f"{name}.safetensors")
    sae = built(config)

    def of(kind: str, ours: str, like: Tensor) -> Tensor:
        value = theirs[f"{kind}.{names.get(ours, ours)}"]
        return value if value.shape == like.shape else value.T

    with torch.no_grad():
        for ours, value in sae.named_parameters():
            value.copy_(of("param", ours, value))
    dead = theirs["dead"]
    if reset:
        with torch.no_grad():
            dead = dead & ~(sae.training_features(sae.pre_activations(theirs["x"])) > 0).any(0)
    result, found = stepped(sae, theirs["x"], dead, way, **others)
    assert result.loss.item() == pytest.approx(theirs["loss"].item(), rel=of_loss)
    assert found.keys() == {name for name, _ in sae.named_parameters()}
    for ours, value in found.items():
        expected = of("grad", ours, value)
        assert (value - expected).abs().max() <= of_gradients * expected.abs().max(), ours
    return result, theirs, sae


def must_agree(one: Any, other: Any) -> None:
    """Two ways of a step found the same, to 1e-9."""
    (result, found), (expected, wanted) = one, other
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert (value - wanted[key]).abs().max() <= 1e-9 * wanted[key].abs().max(), key
    assert torch.equal(result.fired, expected.fired)
    assert torch.allclose(result.output, expected.output, rtol=1e-9)
    assert torch.allclose(result.loss, expected.loss, rtol=1e-9)
    for part in ("losses", "coefficients", "metrics"):
        ours, theirs = getattr(result, part), getattr(expected, part)
        assert list(ours) == list(theirs)
        for name in ours:
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-9), name


def must_be_slopes(sae: SAE, x: Tensor, dead: Tensor | None, way: str) -> None:
    """The gradients are the slopes of the loss, by central differences along a random direction for each parameter."""
    _, found = stepped(sae, x, dead, way)
    draws, step = seeded(8), StepInput(step=0, generator=seeded(), dead=dead)
    for name, value in sae.named_parameters():
        direction = torch.randn(value.shape, dtype=torch.float64, generator=draws)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * 1e-6 * direction
                values.append(sae.losses(x, step).loss.item())
                value -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=2e-6, abs=2e-6), name
