"""What every optimizer has."""

from __future__ import annotations

import attrs

from saekit.config.fields import at_least_0

__all__ = ["OptimizerConfig"]


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """What every optimizer has.  Optimizer plugins derive their options from this class."""

    clip_grad_norm: float = attrs.field(default=1.0, validator=at_least_0)
    """Scale gradients down to this total norm; 0 leaves them alone."""
