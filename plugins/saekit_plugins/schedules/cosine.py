"""LR schedule ``cosineannealing``, also called ``cosine``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.config import check


@attrs.frozen(kw_only=True)
class CosineConfig:
    """Half a cosine from the peak rate down to ``end``."""

    end: float | None = attrs.field(default=None, validator=check(lambda value: value >= 0, "0 or more"))
    """The last rate.  None: a tenth of the peak."""


@attrs.frozen
class Cosine:
    """``end + (lr − end) (1 + cos(π t / steps)) / 2`` (Loshchilov and Hutter 2017, without restarts)."""

    lr: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * step / self.steps)) / 2


@hookimpl
def saekit_register_lr_schedules() -> Iterable[Entry]:
    summary = "half a cosine from the peak rate to `end`"
    yield Entry("cosineannealing", CosineConfig, _build, summary=summary)
    yield Entry("cosine", CosineConfig, _build, summary=f"{summary} (short for cosineannealing)")


def _build(config: CosineConfig, *, lr: float, steps: int) -> Cosine:
    return Cosine(lr, lr / 10 if config.end is None else config.end, steps)
