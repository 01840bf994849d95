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
    """The number of cycles, equally long."""


@attrs.frozen
class CosineRestarts:
    """``end + (lr − end) (1 + cos(π t / T)) / 2``, t counted from the cycle's start (Loshchilov and Hutter 2017)."""

    lr: float
    end: float
    cycle: int

    def __call__(self, step: int) -> float:
        progress = (step % self.cycle) / self.cycle
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * progress)) / 2


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
    return CosineRestarts(lr, lr / 10 if config.end is None else config.end, steps // config.n_restart_cycles)
