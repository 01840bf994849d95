"""What architectures share that are loaded and used, and not trained here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit import ConfigError

if TYPE_CHECKING:
    from saekit.config import TrainConfig

__all__ = ["WHY", "refuse_training"]

WHY = "saekit has no training for it yet; it reads SAEs that other libraries have trained"


def refuse_training(options: Any, whole: TrainConfig) -> None:
    """The ``precheck`` of their entries: a run ends before any model is loaded."""
    raise ConfigError([("sae.name", f"names an architecture that is for inference alone: {WHY}. Choose another")])
