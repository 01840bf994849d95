"""What ``signum`` builds."""

from __future__ import annotations

from typing import Any

import torch

from saekit_plugins.optimizers.signum import SignumConfig


class Signum(torch.optim.Optimizer):
    """``m = β m + (1 − β) g``, from 0; then ``w −= lr (sign m + λ w)`` (algorithm 2 of the paper)."""

    moments = ("momentum",)
    elementwise = True

    def __init__(self, config: SignumConfig, *, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._beta = config.beta
        self._decay = config.weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the parameters' ``grad``."""
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - self._beta)
                parameter.mul_(1 - lr * self._decay).add_(momentum.sign(), alpha=-lr)
