"""A whole training run."""

from __future__ import annotations

import attrs

from saekit.config.activations import ActivationsConfig
from saekit.config.checkpoints import CheckpointsConfig
from saekit.config.dataset import DatasetConfig
from saekit.config.evals import EvalsConfig
from saekit.config.fields import PluginChoice, plugin_field
from saekit.config.model import ModelConfig
from saekit.config.training import TrainingConfig
from saekit.errors import ConfigError
from saekit.kinds import LR_SCHEDULES, OPTIMIZERS, SAE_ARCHITECTURES, TRACKERS
from saekit.site import Site

__all__ = ["TrainConfig"]


@attrs.frozen(kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = attrs.field(factory=ModelConfig)
    """The language model whose activations are studied."""
    dataset: DatasetConfig = attrs.field(factory=DatasetConfig)
    """The text, and how it becomes contexts."""
    site: Site = attrs.field(factory=Site)
    """Where the SAE reads."""
    activations: ActivationsConfig = attrs.field(factory=ActivationsConfig)
    """From contexts to shuffled batches."""
    sae: PluginChoice = plugin_field(SAE_ARCHITECTURES, "saekit:standard")
    """The SAE's architecture and its options."""
    optimizer: PluginChoice = plugin_field(OPTIMIZERS, "saekit:adam")
    """What updates the weights, and its options."""
    lr_schedule: PluginChoice = plugin_field(LR_SCHEDULES, "saekit:constant")
    """The learning rate between warm-up and decay."""
    training: TrainingConfig = attrs.field(factory=TrainingConfig)
    """How long, how fast, and what is watched."""
    evals: EvalsConfig = attrs.field(factory=EvalsConfig)
    """Measurements on text that is never trained on."""
    trackers: tuple[PluginChoice, ...] = plugin_field(TRACKERS, ())
    """Where metrics go beside the JSON lines in the run folder, which are always written."""
    checkpoints: CheckpointsConfig = attrs.field(factory=CheckpointsConfig)
    """Where the run is kept."""

    def __attrs_post_init__(self) -> None:
        if self.evals.split is not None and self.evals.split == self.dataset.split:
            raise ConfigError(
                [("evals.split", f"is {self.evals.split!r}, which is trained on (dataset.split). Name another split, "
                  "or leave it out to keep one document in evals.held_out_every from training")]
            )  # fmt: skip
        if self.evals.run and self.evals.split is None and not self.evals.held_out_every:
            raise ConfigError(
                [("evals.held_out_every", "is 0, so no text is left to measure on; name a split in evals.split, or "
                  "measure nothing: evals.run = []")]
            )  # fmt: skip
