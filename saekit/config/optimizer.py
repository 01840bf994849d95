"""The optimizer."""

from __future__ import annotations

import attrs

from saekit.config.fields import at_least_0, below_1, positive

__all__ = ["OptimizerConfig"]


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """Adam."""

    beta1: float | None = attrs.field(default=None, validator=below_1)
    """Decay of the gradient's mean.  None: what suits the architecture: 0 for `standard`, 0.9 for `topk` and
    `batchtopk`."""
    beta2: float = attrs.field(default=0.999, validator=below_1)
    """Decay of the gradient's square."""
    eps: float = attrs.field(default=1e-8, validator=positive)
    """Added to the square root of the second moment."""
    clip_grad_norm: float = attrs.field(default=1.0, validator=at_least_0)
    """Scale gradients down to this total norm; 0 leaves them alone."""
