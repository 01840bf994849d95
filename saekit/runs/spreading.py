"""What of a run is spread over processes, and what does not work so: it is said before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from saekit.config import TrainConfig
from saekit.distributed.world import World
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager
from saekit.sae.module import SAEModule
from saekit.sae.splitting import check_spread, keep_part, spread_of

__all__ = ["check_spreads", "spread"]


def check_spreads(configs: Sequence[TrainConfig], world: World) -> None:
    """:class:`ConfigError` for what a run of several processes cannot do."""
    if world.size == 1:
        return
    for config in configs:
        if (rows := config.training.train_batch_size_tokens) % world.size:
            raise ConfigError(
                [("training.train_batch_size_tokens", f"is {rows:,}, which {world.size} processes cannot share "
                  "evenly; choose a multiple of their number")]
            )  # fmt: skip
        for name in ("keep_last", "n_checkpoints"):
            if getattr(config.checkpoints, name):
                raise ConfigError(
                    [(f"checkpoints.{name}", f"is {getattr(config.checkpoints, name)}, and a run of several processes "
                      "does not write checkpoints yet; set it to 0")]
                )  # fmt: skip


def spread(sae: SAEModule, world: World, config: TrainConfig, plugins: PluginManager) -> None:
    """Have ``sae`` train on the processes of ``world``, with this one's part of its features.

    :class:`ConfigError` for an architecture, or an option, that does not work so.
    """
    if world.size == 1:
        return
    check_spread(sae, world.data.size, world.features.size)
    if config.training.compile:
        raise ConfigError(
            [("training.compile", f"is true, and a step of {world.size} processes is not compiled; set it to false")]
        )
    sae.spread = spread_of(world.data.size, world.features.size)
    if world.features.size > 1:
        keep_part(sae, world.features)
