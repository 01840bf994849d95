"""What watches a session: evals during training, and trackers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import attrs

from saekit.runs.session import Session
from saekit.runs.trackers import Trackers
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["EvalObserver", "TrackerObserver"]


@attrs.define
class EvalObserver:
    """Measures each SAE every ``evals.every_n_steps`` of its steps."""

    _session: Session

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        member = self._session.members[trainer.name]
        every = member.config.evals.every_n_steps
        if every and trainer.step % every == 0 and trainer.diverged is None:
            metrics |= self._session.evaluate(member)

    def after_batch(self) -> None:
        pass


@attrs.define
class TrackerObserver:
    """Hands metrics to the trackers of each SAE."""

    _session: Session
    _trackers: Mapping[str, Trackers]

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        if trainer.diverged is not None:
            if len(self._trackers) > 1:  # else it is an error, and says so itself
                warnings.warn(f"{trainer.name} is stopped: {trainer.diverged}", RuntimeWarning, stacklevel=4)
        elif metrics:
            self._trackers[trainer.name].log(metrics, trainer.step)
            self._session.members[trainer.name].note(metrics)

    def after_batch(self) -> None:
        pass
