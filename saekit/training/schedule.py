"""The learning rate at every step: warm-up, the plugin's main schedule, decay."""

from __future__ import annotations

import math
from collections.abc import Callable

from saekit.abilities import Remarks
from saekit.config import TrainingConfig
from saekit.errors import ConfigError
from saekit.plugins.building import blamed, returned
from saekit.plugins.registry import Registered
from saekit.protocols import LRSchedule

__all__ = ["ComposedSchedule", "SupervisedSchedule"]


class SupervisedSchedule:
    """The main schedule of the plugin ``item``, whose faults say so.

    What is below 0 by no more than rounding, seen from the rate ``lr``, is 0.
    """

    def __init__(self, schedule: LRSchedule, item: Registered, lr: float = 0.0) -> None:
        self._schedule, self._item, self._rounding = schedule, item, 1e-6 * lr
        self.end = schedule.end

    def remark(self) -> str | None:
        """What it has to say, if anything."""
        if not isinstance(self._schedule, Remarks):
            return None
        with blamed(self._item, "remark"):
            said: object = self._schedule.remark()
        if said is not None and not isinstance(said, str):
            raise returned(self._item, "remark", said, "expected a text or None")
        return said

    def __call__(self, step: int) -> float:
        with blamed(self._item, f"__call__ of step {step}", at_work=True):
            rate = float(self._schedule(step))
        if not math.isfinite(rate) or rate < -self._rounding:
            raise returned(self._item, f"__call__ of step {step}", rate, "expected a finite number of 0 or more")
        return max(rate, 0.0)


class ComposedSchedule:
    """``schedule(step)`` for steps 0 … N−1.

    Step t of the w warm-up steps has ``lr (t + 1) / w``; the main schedule begins at step w with its own step 0 and
    spans N − w − D steps; step j of the last D has ``(1 − j / D)`` of the main schedule's end rate.

    Training may take more than N steps, where a source gives batches that are not full: from then on the rate is that
    of step N − 1.  The main schedule is never asked for a step beyond its own.
    """

    def __init__(self, training: TrainingConfig, build: Callable[[int], LRSchedule]) -> None:
        self._lr, self._steps = training.lr, training.steps
        self._warm_up, self._decay = training.lr_warm_up_steps, training.lr_decay_steps
        self._main = build(self._steps - self._warm_up - self._decay)
        if self._decay and self._main.end <= 0:
            raise ConfigError(
                [("training.lr_decay_steps", f"the schedule already ends at {self._main.end:g}, so there is nothing to "
                  "decay from; give the schedule an end above 0, or set training.lr_decay_steps=0")]
            )  # fmt: skip

    def remark(self) -> str | None:
        """What the main schedule has to say, if anything."""
        return self._main.remark() if isinstance(self._main, Remarks) else None

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, from 0."""
        if step < 0:
            raise ValueError(f"step {step} is before the first step, 0")
        step = min(step, self._steps - 1)
        if step < self._warm_up:
            return self._lr * (step + 1) / self._warm_up
        into_decay = step - (self._steps - self._decay)
        if into_decay >= 0 and self._decay:
            return self._main.end * (1 - into_decay / self._decay)
        return float(self._main(step - self._warm_up))
