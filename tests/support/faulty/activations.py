"""Activation functions that break a promise each."""

from __future__ import annotations

from support.faulty.case import cases
from torch import Tensor


class HalfSparse:
    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_()


def detached(pre: Tensor) -> Tensor:
    return pre * pre.detach()


def summed(pre: Tensor) -> Tensor:
    return pre.relu().sum(-1)


def exponential(pre: Tensor) -> Tensor:
    return pre.exp()


CASES = cases(
    "activation_functions",
    {
        "build": ("expected an activation function", lambda config: None),
        "shape": (r"it turns \[5\] of torch.float64 into \[\] of", lambda config: summed),
        "finite": ("at .* it is .*inf", lambda config: exponential),
        "gradient": ("is not that of small changes", lambda config: detached),
        "sparse": ("it has in_place alone; sparse support is in_place and pre_gradient", lambda config: HalfSparse()),
    },
)
