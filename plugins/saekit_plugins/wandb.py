"""Tracker ``wandb``: Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from saekit import Entry, RunInfo, hookimpl
from saekit.config import check


@attrs.frozen(kw_only=True)
class WandbConfig:
    """Sends metrics and the configuration to Weights & Biases."""

    project: str = attrs.field(default="saekit", validator=check(lambda value: bool(value.strip()), "a project name"))
    """The project."""
    entity: str | None = None
    """The user or team; None: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run folder, without login or network; `wandb sync` sends it later."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class WandbTracker:
    """One W&B run per SAE."""

    def __init__(self, config: WandbConfig, run: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            mode=config.mode,
            tags=list(config.tags),
            settings=wandb.Settings(silent=True),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


@hookimpl
def saekit_register_trackers() -> Iterable[Entry]:
    yield Entry("wandb", WandbConfig, _build, requires=("wandb",), extra="wandb", summary="Weights & Biases")


def _build(config: WandbConfig, *, run: RunInfo) -> WandbTracker:
    return WandbTracker(config, run)
