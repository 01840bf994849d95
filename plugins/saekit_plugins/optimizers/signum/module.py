"""What ``signum`` builds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit_plugins.optimizers.signum import SignumConfig


class Signum(torch.optim.Optimizer):
    """``m = β m + (1 − β) g``, from 0; then ``w −= lr (sign m + λ w)`` (algorithm 2 of the paper)."""

    moments = ("momentum",)
    elementwise = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, config: SignumConfig, *, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._beta = config.beta
        self._decay = config.weight_decay
        # By these a GPU need not be waited for.  They are of float32, so in float64 they would cost digits.
        if all(parameter.dtype != torch.float64 for group in self.param_groups for parameter in group["params"]):
            self.grad_scale = self.found_inf = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the parameters' ``grad``, whose memory is given up."""
        scale, failed = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        sound = None if failed is None else failed == 0
        for group in self.param_groups:
            # The device alone knows whether the step failed: then it goes by nothing, and the mean stays as it is.
            lr = group["lr"] if sound is None else group["lr"] * sound
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                gradient = gradient if scale is None else gradient.div_(scale)
                momentum.lerp_(gradient if sound is None else gradient.where(sound, momentum), 1 - self._beta)
                parameter.mul_(1 - lr * self._decay).sub_(momentum.sign().mul_(lr))
