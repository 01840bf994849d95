"""Fixtures of the tests of training."""

from __future__ import annotations

from typing import Any

import pytest
from support.training import Step, weights
from torch import Tensor

from saekit.training.trainer import SAETrainer


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step of the runs of a test."""
    found: list[Step] = []
    original = SAETrainer.train_on

    def watched(trainer: SAETrainer, batch: Tensor, *rest: Any) -> Any:
        before = weights(trainer)
        metrics = original(trainer, batch, *rest)
        x = batch.to(trainer.sae.W_enc.dtype) * trainer.scale
        found.append(Step(trainer.sae, x, before, weights(trainer), dict(metrics)))
        return metrics

    monkeypatch.setattr(SAETrainer, "train_on", watched)
    return found
