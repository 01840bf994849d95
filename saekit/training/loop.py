"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from saekit.distributed.batches import thinned
from saekit.distributed.group import Group
from saekit.errors import DivergedError
from saekit.protocols import ActivationSource
from saekit.training.elsewhere import Elsewhere, told_by_all
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Histogram

__all__ = ["Lane", "Observer", "fit", "rows_left"]


@attrs.define
class Lane:
    """SAEs that train on the same batches."""

    source: ActivationSource
    trainers: list[SAETrainer]
    tokens: int = 0
    """Rows that the source has given."""
    batches: int = 0
    """Batches on which every SAE has made its step."""
    untold: list[tuple[SAETrainer, dict[str, float | Histogram]]] = attrs.field(factory=list)
    """What the last step gave, until every observer has seen it: what fails in one comes again when the run goes on."""
    ended: bool = False
    """The source has no more."""
    stepping: bool = False
    """A batch is on its way; some of the SAEs have seen it, others perhaps not yet."""
    beside: Group = attrs.field(factory=Group)
    """The processes that train some of the SAEs each, on the same batches."""
    release: Callable[[], None] = lambda: None
    """To be called when no SAE has steps left: what other lanes read need not be kept for this one."""

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


def rows_left(lanes: Sequence[Lane], number: int) -> int | None:
    """Rows that the SAEs of the lane ``number`` have still to see; None: it has none of them yet."""
    trainers = lanes[number].trainers if number < len(lanes) else []
    left = [0 if one.finished else one.training.total_tokens - one.tokens for one in trainers]
    return max(left, default=None)


def fit(lanes: Sequence[Lane], observers: Sequence[Observer] = ()) -> None:
    """Train every SAE until it has seen its tokens or the batches end.  One SAE is a lane of one.

    An SAE whose loss is no longer a number leaves; its ``diverged`` says why.
    """
    for lane in lanes:
        _tell(lane, observers)  # of a step that a run made before it was stopped
    while running := [lane for lane in lanes if lane.training]:
        lane = min(running, key=lambda lane: lane.tokens)  # side by side, so that they can share the model's forwards
        batch = _next_batch(lane)
        if batch is None:
            lane.ended = True
            lane.release()
            continue
        lane.tokens += batch.whole
        lane.untold = told_by_all(lane.beside, [(trainer, _step(trainer, batch)) for trainer in lane.training])
        lane.batches += 1
        lane.stepping = False
        if not lane.training:
            lane.release()
        _tell(lane, observers)


def _next_batch(lane: Lane) -> Batch | None:
    """From here to the end of the step, the lane is not in a state to go on from."""
    lane.stepping = True
    try:
        batch = next(lane.source, None)
    except Exception:
        lane.stepping = False  # a source that failed has given nothing; one that was interrupted may have
        raise
    lane.stepping = batch is not None
    return batch


def _tell(lane: Lane, observers: Sequence[Observer]) -> None:
    if not lane.untold:
        return
    for observer in observers:
        for trainer, metrics in lane.untold:
            observer.after_step(trainer, metrics)
    lane.untold = []
    for observer in observers:
        observer.after_batch()


def _step(trainer: SAETrainer, batch: Batch) -> dict[str, float | Histogram]:
    left = trainer.training.total_tokens - trainer.tokens
    if isinstance(trainer, Elsewhere):
        trainer.pass_by(min(left, batch.whole))
        return {}
    batch = thinned(batch, left, trainer.world) if batch.counts else batch.thinned(left)
    try:
        metrics = trainer.train_on(*trainer.rows_of(batch), batch)
    except DivergedError as error:
        trainer.diverged = str(error)
        return {}
    if metrics and batch.documents is not None:
        documents = trainer.world.share(batch.counts).all_rows(batch.documents)
        metrics["details/distinct_documents"] = len(documents.unique())  # how well the batch is mixed
    return metrics
