"""The training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from saekit.protocols import Batch
from saekit.training.trainer import SAETrainer

__all__ = ["Observer", "fit"]


class Observer(Protocol):
    """Is told what happens; may look at the trainers, never change what they draw."""

    def after_step(self, trainers: Sequence[SAETrainer], metrics: Sequence[dict[str, float]]) -> None:
        """After each step; ``metrics`` has one dict per trainer, empty when nothing is logged."""


def fit(
    trainers: Sequence[SAETrainer], batches: Iterable[Batch], training_tokens: int, observers: Sequence[Observer] = ()
) -> int:
    """Train every SAE on the same batches until ``training_tokens`` rows were seen or the batches end.

    Returns the number of rows.  One SAE is a list of one.
    """
    tokens = 0
    for batch in batches:
        batch = batch.thinned(training_tokens - tokens)
        tokens += len(batch)
        last = tokens >= training_tokens
        metrics = [trainer.train_on(batch.activations[trainer.site], last=last) for trainer in trainers]
        if any(metrics) and batch.documents is not None:
            mixed = {"details/distinct_documents": len(batch.documents.unique())}  # how well the batch is mixed
            metrics = [logged | mixed if logged else logged for logged in metrics]
        for observer in observers:
            observer.after_step(trainers, metrics)
        if last:
            break
    return tokens
