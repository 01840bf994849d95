"""Adam with clipping, in as few passes as torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saekit.config import OptimiserConfig

__all__ = ["Optimiser"]


class Optimiser:
    """Clips the gradient's total norm and takes a fused Adam step at the scheduled rate."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimiserConfig, schedule: Callable[[int], float]
    ) -> None:
        self._parameters = list(parameters)
        self._clip = config.clip_grad_norm
        self._schedule = schedule
        betas = (config.beta1, config.beta2)
        self._adam = torch.optim.Adam(self._parameters, lr=schedule(0), betas=betas, eps=config.eps, fused=True)
        self.lr = schedule(0)
        """The rate of the last step."""

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """One update from the parameters' ``grad``, which is freed; returns the norm before clipping."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self.lr = self._schedule(step)
        for group in self._adam.param_groups:
            group["lr"] = self.lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._adam.load_state_dict(state)
