"""What watches a run: trackers, evals during training, and the run folder's record."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import attrs

from saekit.protocols import Tracker
from saekit.training.trainer import SAETrainer

__all__ = ["EvalObserver", "TrackerObserver", "Trackers"]


@attrs.define
class Trackers:
    """All trackers of one SAE.  One that fails is reported once and left alone from then on; training goes on."""

    _trackers: dict[str, Tracker]

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send ``metrics`` to every tracker that still works."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(metrics, step)
            except Exception as error:  # a tracker is a stranger: nothing it raises may stop training
                del self._trackers[name]
                with contextlib.suppress(Exception):
                    tracker.close()
                warnings.warn(
                    f"tracker {name} failed at step {step} and is off now: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """End every tracker."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                warnings.warn(f"tracker {name} failed to close: {error}", RuntimeWarning, stacklevel=2)


@attrs.define
class TrackerObserver:
    """Hands metrics to the trackers and remembers the last of each."""

    _trackers: Sequence[Trackers]
    latest: list[dict[str, float]] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.latest = [{} for _ in self._trackers]

    def after_step(self, trainers: Sequence[SAETrainer], metrics: Sequence[dict[str, float]]) -> None:
        for trainer, trackers, latest, logged in zip(trainers, self._trackers, self.latest, metrics, strict=True):
            if logged:
                trackers.log(logged, trainer.step)
                latest.update(logged)


@attrs.define
class EvalObserver:
    """Measures every ``every_n_steps`` steps."""

    _every_n_steps: int
    _evaluate: Callable[[SAETrainer], dict[str, float]]

    def after_step(self, trainers: Sequence[SAETrainer], metrics: Sequence[dict[str, float]]) -> None:
        for trainer, logged in zip(trainers, metrics, strict=True):
            if self._every_n_steps and trainer.step % self._every_n_steps == 0:
                logged |= self._evaluate(trainer)
