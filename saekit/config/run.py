"""A whole training run."""

from __future__ import annotations

import attrs

from saekit.config.activations import ActivationsConfig
from saekit.config.checkpoints import CheckpointsConfig
from saekit.config.dataset import DatasetConfig
from saekit.config.distributed import DistributedConfig
from saekit.config.evals import EvalsConfig
from saekit.config.fields import INSTEAD_OF, PluginChoice, plugin_field
from saekit.config.model import ModelConfig
from saekit.config.reports import ReportsConfig
from saekit.config.showing import changed_repr
from saekit.config.tokens import TokensConfig
from saekit.config.training import TrainingConfig
from saekit.defaults import DEFAULT_ARCHITECTURE, DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE
from saekit.errors import ConfigError
from saekit.kinds import LR_SCHEDULES, OPTIMIZERS, SAE_ARCHITECTURES, TRACKERS
from saekit.site import Site, Sites

__all__ = ["TrainConfig"]


@attrs.frozen(kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = attrs.field(factory=ModelConfig)
    """The language model whose activations are studied."""
    dataset: DatasetConfig = attrs.field(factory=DatasetConfig)
    """The text, and how it becomes contexts."""
    site: Site = attrs.field(factory=Site)
    """Where an SAE reads and writes: the one site of a dictionary that has one."""
    inputs: tuple[Site, ...] = attrs.field(default=(), metadata={INSTEAD_OF: "site"})
    """The sites that a dictionary reads which has several, or which writes elsewhere, instead of `site`; their vectors
    lie side by side in this order.  `sae.d_in`, where it is stated, is the sum of their widths."""
    targets: tuple[Site, ...] = ()
    """The sites whose activations it is to give, beside `inputs`.  None named: the inputs themselves."""
    tokens: TokensConfig = attrs.field(factory=TokensConfig)
    """Which tokens count."""
    activations: ActivationsConfig = attrs.field(factory=ActivationsConfig)
    """From contexts to shuffled batches."""
    sae: PluginChoice = plugin_field(SAE_ARCHITECTURES, DEFAULT_ARCHITECTURE)
    """The SAE's architecture and its options."""
    optimizer: PluginChoice = plugin_field(OPTIMIZERS, DEFAULT_OPTIMIZER)
    """What updates the weights, and its options."""
    lr_schedule: PluginChoice = plugin_field(LR_SCHEDULES, DEFAULT_SCHEDULE)
    """The learning rate between warm-up and decay."""
    training: TrainingConfig = attrs.field(factory=TrainingConfig)
    """How long, how fast, and what is watched."""
    evals: EvalsConfig = attrs.field(factory=EvalsConfig)
    """Measurements on text that is never trained on."""
    trackers: tuple[PluginChoice, ...] = plugin_field(TRACKERS, ())
    """Where metrics go beside the JSON lines in the run folder, which are always written."""
    checkpoints: CheckpointsConfig = attrs.field(factory=CheckpointsConfig)
    """Where the run is kept."""
    reports: ReportsConfig = attrs.field(factory=ReportsConfig)
    """What the run leaves behind to be looked at."""
    distributed: DistributedConfig = attrs.field(factory=DistributedConfig)
    """How the run is spread over processes."""

    __repr__ = changed_repr

    @property
    def sites(self) -> Sites:
        """What is read and written."""
        if not self.inputs:
            return Sites.one(self.site)
        return Sites(self.inputs, self.targets or self.inputs)

    def __attrs_post_init__(self) -> None:
        self._check_sites()
        if self.dataset.context_size is not None:
            self.tokens.positions(self.dataset.context_size)
        if self.evals.split is not None and self.evals.split == self.dataset.split:
            raise ConfigError(
                [("evals.split", f"is {self.evals.split!r}, which is trained on (dataset.split). Name another split, "
                  "or leave it out to keep one document in evals.held_out_every from training")]
            )  # fmt: skip
        if self.evals.reads_text and self.evals.split is None and not self.evals.held_out_every:
            raise ConfigError(
                [("evals.held_out_every", "is 0, so no text is left to measure on; name a split in evals.split, or "
                  "measure nothing: evals.run=[]")]
            )  # fmt: skip

    def _check_sites(self) -> None:
        if self.targets and not self.inputs:
            raise ConfigError(
                [("targets", f"names what is to be given, {_named(self.targets)}, and nothing names what is read "
                  "besides: name those sites in inputs. What reads and writes one site has it in site")]
            )  # fmt: skip
        if self.inputs and self.site != Site():
            raise ConfigError(
                [("site", f"is {self.site.name}, beside inputs = {_named(self.inputs)}, which are all that is read; "
                  "leave out one of the two")]
            )  # fmt: skip
        _ = self.sites


def _named(sites: tuple[Site, ...]) -> str:
    return ", ".join(site.name for site in sites)
