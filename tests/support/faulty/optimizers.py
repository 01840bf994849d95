"""Optimizers that break a promise each."""

from __future__ import annotations

from typing import Any

import torch
from support.faulty.case import cases


class Descent(torch.optim.SGD):
    """Nothing is wrong with it."""

    def __init__(self, config: Any, *, groups: list[dict[str, Any]], lr: float, **options: Any) -> None:
        super().__init__(groups, lr=lr, **options)


class Ascent(Descent):
    def __init__(self, config: Any, **services: Any) -> None:
        super().__init__(config, **services, maximize=True)


class Forgetful(Descent):
    def __init__(self, config: Any, *, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(config, groups=groups[:1], lr=lr)


class Steady(Descent):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.01
        return super().step()


class Decaying(Descent):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] / 100)
        return super().step()


class Hidden(Descent):
    """Slows down by a count that is not in its state."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        return super().step()


class ByNorm(Descent):
    """Steps of one length, whatever the gradient's, which only who sees all of it can make."""

    elementwise = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm().clamp_min(1e-9)
        return super().step()


class Flat(Descent):
    """Keeps the weights that were there, in one row."""

    elementwise = True

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["past"] = parameter.detach().flatten()
        return super().step()


class Replacing(Descent):
    """Gives a parameter other memory, so that what is a part of another is one no more."""

    elementwise = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter - group["lr"] * parameter.grad


CASES = cases(
    "optimizers",
    {
        "build": ("expected an optimizer", lambda config, **services: None),
        "step": ("200 steps lead away from the minimum", Ascent),
        "groups": ("its param_groups lack the parameter slower", Forgetful),
        "rate": ("parameters after steps with lr 0, matrix: other numbers", Steady),
        "no_gradient": ("matrix, which has no gradient,: other numbers", Decaying),
        "two_processes": (r"matrix after steps of two processes with half of it each \(elementwise\): off by", ByNorm),
        "divided_state": (r"keeps past of matrix \(\[7, 5\]\) as shape \[35\], which cannot be divided", Flat),
        "state": ("weights after a state was loaded, of 0 steps,", Hidden),
    },
)
