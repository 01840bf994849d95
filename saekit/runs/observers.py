"""What watches a session: evals during training, and trackers."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from saekit.cautions import warn
from saekit.runs.measuring import evaluate
from saekit.runs.session import Session
from saekit.runs.trackers import Trackers
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["EvalObserver", "TrackerObserver"]


@attrs.define
class EvalObserver:
    """Measures each SAE every ``evals.every_n_steps`` of its steps."""

    _session: Session
    _found: dict[str, dict[str, float | Histogram]] = attrs.field(factory=dict, init=False)
    """Of SAEs that were measured with one before them, and are not told of yet."""

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        if not self._is_due(trainer):
            return
        if trainer.name not in self._found:
            self._found = evaluate(self._session, [self._session.members[name] for name in self._due_with(trainer)])
        metrics |= self._found.pop(trainer.name)

    def _is_due(self, trainer: SAETrainer) -> bool:
        every = self._session.members[trainer.name].config.evals.every_n_steps
        return bool(every) and trainer.step % every == 0 and trainer.diverged is None

    def _due_with(self, trainer: SAETrainer) -> list[str]:
        """All that are due after the same batch: they share the model's forwards."""
        beside = next(
            [one for one, _ in lane.untold]
            for lane in self._session.lanes
            if any(one is trainer for one, _ in lane.untold)
        )
        return [one.name for one in beside if self._is_due(one)]

    def after_batch(self) -> None:
        self._found.clear()


@attrs.define
class TrackerObserver:
    """Hands metrics to the trackers of each SAE."""

    _session: Session
    _trackers: Mapping[str, Trackers]

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        if trainer.diverged is not None:
            if len(self._trackers) > 1:  # else it is an error, and says so itself
                warn(f"{trainer.name} is stopped: {trainer.diverged}", RuntimeWarning)
        elif metrics:
            self._trackers[trainer.name].log(metrics, trainer.step)
            self._session.members[trainer.name].note(metrics)

    def after_batch(self) -> None:
        pass
