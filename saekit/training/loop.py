"""The training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs

from saekit.errors import DivergedError
from saekit.protocols import ActivationSource, Batch, Histogram
from saekit.training.trainer import SAETrainer

__all__ = ["Lane", "Observer", "fit"]


@attrs.define
class Lane:
    """SAEs that train on the same batches."""

    source: ActivationSource
    trainers: list[SAETrainer]
    tokens: int = 0
    """Rows that the source has given."""
    ended: bool = False
    """The source has no more."""
    stepping: bool = False
    """Some of the SAEs have seen the last batch, others perhaps not yet."""

    @property
    def training(self) -> list[SAETrainer]:
        """The SAEs that have steps left."""
        return [] if self.ended else [trainer for trainer in self.trainers if not trainer.finished]


class Observer(Protocol):
    """Is told what happens; may look at the trainers, never change what they draw."""

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        """After each step of each SAE; ``metrics`` is empty when nothing is logged."""

    def after_batch(self) -> None:
        """When every SAE has seen the batch, so that all are between two steps."""


def fit(lanes: Sequence[Lane], observers: Sequence[Observer] = ()) -> None:
    """Train every SAE until it has seen its tokens or the batches end.  One SAE is a lane of one.

    An SAE whose loss is no longer a number leaves; its ``diverged`` says why.
    """
    while running := [lane for lane in lanes if lane.training]:
        lane = min(running, key=lambda lane: lane.tokens)  # side by side, so that they can share the model's forwards
        batch = next(lane.source, None)
        if batch is None:
            lane.ended = True
            continue
        lane.tokens += len(batch)
        lane.stepping = True
        stepped = [(trainer, _step(trainer, batch)) for trainer in lane.training]
        lane.stepping = False
        for observer in observers:
            for trainer, metrics in stepped:
                observer.after_step(trainer, metrics)
        for observer in observers:
            observer.after_batch()


def _step(trainer: SAETrainer, batch: Batch) -> dict[str, float | Histogram]:
    batch = batch.thinned(trainer.training.total_tokens - trainer.tokens)
    try:
        metrics = trainer.train_on(batch.activations[trainer.site])
    except DivergedError as error:
        trainer.diverged = str(error)
        return {}
    if metrics and batch.documents is not None:
        metrics["details/distinct_documents"] = len(batch.documents.unique())  # how well the batch is mixed
    return metrics
