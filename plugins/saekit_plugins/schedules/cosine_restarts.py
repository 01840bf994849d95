"""LR schedule ``cosineannealingwarmrestarts``, also called ``cosine-restarts``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import check


@attrs.frozen(kw_only=True)
class CosineRestartsConfig:
    """Cosines from the peak rate down to ``end``, one after the other."""

    end: float | None = attrs.field(default=None, validator=check(lambda value: value >= 0, "0 or more"))
    """The rate at the end of a cycle.  None: a tenth of the peak."""
    n_restart_cycles: int = attrs.field(default=1, validator=check(lambda value: value >= 1, "1 or more"))
    """The number of cycles.  Each has ⌊steps / cycles⌋ steps, as in sae-lens 3.0.0: steps that are left over begin one
    more cycle."""
    fill: bool = False
    """Share the steps out among the cycles, so that none is left over: some are longer than others by one step."""


@attrs.frozen
class CosineRestarts:
    """``end + (lr − end) (1 + cos(π t / T)) / 2``, t counted from the cycle's start (Loshchilov and Hutter 2017)."""

    lr: float
    end: float
    steps: int
    """Steps of all cycles."""
    cycles: int
    fill: bool = False
    """Whether the cycles take all steps; else each takes T = ⌊steps / cycles⌋, and the rest is the start of another."""

    def __call__(self, step: int) -> float:
        start, end = self._cycle_of(step)
        progress = (step - start) / (end - start)
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def _cycle_of(self, step: int) -> tuple[int, int]:
        """The first step of the cycle that ``step`` is in, and the first of the next."""
        if self.fill:
            number = ((step + 1) * self.cycles - 1) // self.steps
            return number * self.steps // self.cycles, (number + 1) * self.steps // self.cycles
        length = self.steps // self.cycles
        return step - step % length, step - step % length + length

    def remark(self) -> str | None:
        """What `saekit plan` says of it."""
        length, left = divmod(self.steps, self.cycles)
        if self.fill or not left:
            return None
        return (
            f"lr_schedule: {self.cycles} cycles of {length:,} steps take {self.steps - left:,} of {self.steps:,} steps,"
            f" and the last {left:,} begin one more, near the peak rate; lr_schedule.fill=true shares all steps out"
        )


@hookimpl
def saekit_register_lr_schedules() -> Iterable[Entry]:
    summary = "cosines from the peak rate to `end`, `n_restart_cycles` times"
    yield Entry("cosineannealingwarmrestarts", CosineRestartsConfig, _build, summary=summary)
    yield Entry("cosine-restarts", CosineRestartsConfig, _build, summary=f"{summary} (short for it)")


def _build(config: CosineRestartsConfig, *, lr: float, steps: int) -> CosineRestarts:
    if config.n_restart_cycles > steps:
        raise ConfigError(
            [("lr_schedule.n_restart_cycles", f"is {config.n_restart_cycles}, more than the schedule's {steps} steps")]
        )
    end = lr / 10 if config.end is None else config.end
    return CosineRestarts(lr, end, steps, config.n_restart_cycles, config.fill)
