"""Optimizer ``adam`` (Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization"): torch's, fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from saekit import Entry, hookimpl
from saekit.config import OptimizerConfig, check
from saekit.devices import KERNEL_DEVICES
from saekit.protocols import Optimizer

_below_1 = check(lambda value: 0 <= value < 1, "at least 0 and below 1")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@attrs.frozen(kw_only=True)
class AdamConfig(OptimizerConfig):
    """Steps by the gradient's mean over the root of its mean square, both of the recent past."""

    beta1: float | None = attrs.field(default=None, validator=_below_1)
    """Decay of the gradient's mean.  None: what suits the architecture: 0 for `standard`, 0.9 for the
    others."""
    beta2: float = attrs.field(default=0.999, validator=_below_1)
    """Decay of the gradient's square."""
    eps: float = attrs.field(default=1e-8, validator=check(lambda value: value > 0, "above 0"))
    """Added to the square root of the second moment."""


@hookimpl
def saekit_register_optimizers() -> Iterable[Entry]:
    yield Entry("adam", AdamConfig, _build, summary="torch's Adam, fused where it can be")


def _build(config: AdamConfig, *, groups: list[dict[str, Any]], lr: float) -> Optimizer:
    import torch

    parameters = [parameter for group in groups for parameter in group["params"]]
    # In float64 runs are compared to the last digits, and torch's plain loop has the order of operations of others.
    fused = all(p.device.type in KERNEL_DEVICES and p.dtype != torch.float64 for p in parameters)
    betas = (config.beta1 or 0.0, config.beta2)
    adam: Any = torch.optim.Adam(groups, lr=lr, betas=betas, eps=config.eps, fused=fused)
    adam.moments, adam.elementwise = _MOMENTS, True
    if fused:  # its kernel looks at both, on the device
        adam.grad_scale = adam.found_inf = None
    made: Optimizer = adam
    return made
