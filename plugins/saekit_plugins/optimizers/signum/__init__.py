"""Optimizer ``signum`` (Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems")."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.config import OptimizerConfig, check


@attrs.frozen(kw_only=True)
class SignumConfig(OptimizerConfig):
    """Every number moves by the learning rate, against the sign of its gradient's mean in the recent past.

    It keeps one moment where Adam keeps two.
    """

    beta: float = attrs.field(default=0.9, validator=check(lambda value: 0 <= value < 1, "at least 0 and below 1"))
    """Decay of the gradient's mean.  0: signSGD."""
    weight_decay: float = attrs.field(default=0.0, validator=check(lambda value: value >= 0, "0 or more"))
    """How much of every weight goes with each step, in units of the learning rate."""


@hookimpl
def saekit_register_optimizers() -> Iterable[Entry]:
    build = f"{__name__}.module:Signum"
    yield Entry("signum", SignumConfig, build, summary="signSGD with momentum")
