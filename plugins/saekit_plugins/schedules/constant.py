"""LR schedule ``constant``."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl


@attrs.frozen(kw_only=True)
class ConstantConfig:
    """The peak rate throughout; no options."""


@attrs.frozen
class Constant:
    """The rate that it is given."""

    end: float

    def __call__(self, step: int) -> float:
        return self.end


@hookimpl
def saekit_register_lr_schedules() -> Iterable[Entry]:
    yield Entry("constant", ConstantConfig, _build, summary="the peak rate throughout")


def _build(config: ConstantConfig, *, lr: float, steps: int) -> Constant:
    return Constant(lr)
