"""What `check_sparse_activation` accepts, and what it must find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, softplus

from saekit.testing import check_sparse_activation


class Relu:
    """Right; the base of what is wrong in one thing."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_(features > 0)


class Squared(Relu):
    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().square()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_().square_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_(2 * features.sqrt())


class Tanh(Relu):
    """By one formula forwards, by another in place: they differ in their last digits."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().tanh()

    def in_place(self, pre: Tensor) -> Tensor:
        falling = (-2 * pre.relu_()).exp()
        return pre.copy_((1 - falling) / (1 + falling))

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_((1 - features) * (1 + features) * (features > 0))


class InFloat32(Tanh):
    """In single precision, whatever comes."""

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.copy_(pre.float().relu().tanh())


class Saturating(Relu):
    def __call__(self, pre: Tensor) -> Tensor:
        return 1 - (-pre.relu()).exp()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_().neg_().expm1_().neg_().abs_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient * (1 - features) * (features > 0)


class Growing(Relu):
    """Too large for any dtype, far out."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().exp() - 1

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_().expm1_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_((features + 1) * (features > 0))


class Logarithm(Relu):
    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().log1p()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_().add_(1).log_() if pre.dtype == torch.float64 else pre.relu_().log1p_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_((-features).exp() * (features > 0))


class Thresholded(Relu):
    """x where it is above 1."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre * (pre > 1)

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.mul_(pre > 1)


class Clipped(Relu):
    """x up to 6, whose slope at 6 is a matter of taste."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().clamp(max=6)

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.clamp_(0, 6)

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        return gradient.mul_((features > 0) & (features < 6))


RIGHT = [Relu, Squared, Tanh, InFloat32, Saturating, Growing, Logarithm, Thresholded, Clipped]


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_right_ones_pass(kind: type[Relu]) -> None:
    check_sparse_activation(kind())


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode])
def test_whatever_the_surroundings(ambient: Any) -> None:
    with ambient():
        check_sparse_activation(Relu())


def wrong(base: type[Relu] = Relu, **methods: Any) -> Relu:
    return type("Wrong", (base,), methods)()


def only_many(pre: Tensor) -> Tensor:
    """Right for few numbers, wrong for many."""
    return pre.relu_() if pre.numel() < 100_000 else pre.clamp_(0, 1)


WRONG = {
    "leaks below zero": (wrong(__call__=lambda self, pre: torch.where(pre > 0, pre, -pre / 999)), "is not zero where"),
    "gelu": (wrong(__call__=lambda self, pre: gelu(pre)), "negative somewhere"),
    "softplus": (wrong(__call__=lambda self, pre: softplus(pre)), "not zero wherever pre <= 0"),
    "negative": (wrong(__call__=lambda self, pre: -pre.relu()), "negative somewhere"),
    "not a number": (wrong(__call__=lambda self, pre: pre.relu() / pre.relu()), "not a number somewhere"),
    "normed": (wrong(__call__=lambda self, pre: pre.relu() / (1 + pre.relu().sum())), "every number by itself"),
    "a maximum": (wrong(__call__=lambda self, pre: pre.relu() * (pre == pre.max())), "every number by itself"),
    "random": (
        wrong(__call__=lambda self, pre: pre.relu() * (1 + 0.01 * torch.rand_like(pre))), "every number by itself",
    ),
    "slope at zero": (wrong(__call__=lambda self, pre: pre.clamp(min=0)), "its derivative is not zero wherever pre"),
    "changes what it gets": (wrong(__call__=lambda self, pre: pre.data.relu_() + pre * 0), "changes its argument"),
    "another shape": (wrong(__call__=lambda self, pre: pre.relu()[:1]), "it turns the shape"),
    "another dtype": (wrong(__call__=lambda self, pre: pre.relu().double()), "it turns torch.float32 into"),
    "no tensor": (wrong(__call__=lambda self, pre: 0), "it returns int, not a tensor"),
    "no derivative": (wrong(__call__=lambda self, pre: pre.detach().relu()), "its derivative raises RuntimeError"),
    "needs two dimensions": (wrong(in_place=lambda self, pre: pre[:, :].relu_()), "in_place raises IndexError"),
    "needs a number": (
        wrong(pre_gradient=lambda self, gradient, features: gradient * (features > 0) * (features.max() > -1)),
        r"pre_gradient raises .* \(for the shape \[0\] and \[0\]",
    ),
    "written elsewhere": (wrong(in_place=lambda self, pre: pre.relu()), "in_place does not write over its argument"),
    "a part of it": (wrong(in_place=lambda self, pre: pre.relu_()[:1]), "in_place turns the shape"),
    "returns nothing": (wrong(in_place=lambda self, pre: None), "in_place returns NoneType, not a tensor"),
    "another function": (wrong(in_place=lambda self, pre: pre.clamp_(0, 1)), "in_place is not what calling it returns"),
    "slightly another": (wrong(in_place=lambda self, pre: pre.relu_().mul_(1.0001)), "not what calling it returns"),
    "an offset": (wrong(in_place=lambda self, pre: pre.relu_().add_(1e-3)), "in_place is not what calling it returns"),
    "nearly zero": (wrong(in_place=lambda self, pre: pre.relu_().add_(1e-9)), "in_place is not zero wherever pre"),
    "many": (wrong(in_place=lambda self, pre: only_many(pre)), r"calling it returns for the shape \[512, 513\]"),
    "no mask": (wrong(pre_gradient=lambda self, gradient, features: gradient), "pre_gradient is not what autograd"),
    "of another": (wrong(__call__=lambda self, pre: pre.relu().square()), "pre_gradient is not what autograd finds"),
    "half of it": (wrong(Squared, pre_gradient=lambda self, g, f: g * f.sqrt()), "pre_gradient is not what autograd"),
    "slope of a zero": (
        wrong(Tanh, pre_gradient=lambda self, g, f: g * (1 - f * f)), "pre_gradient is not what autograd finds",
    ),
    "changes the features": (
        wrong(Squared, pre_gradient=lambda self, g, f: g.mul_(f.sqrt_().mul_(2))), "pre_gradient changes the features",
    ),
    "sums up": (
        wrong(pre_gradient=lambda self, g, f: g * (f > 0) if f.dim() == 2 else (g * (f > 0)).flip(0)),
        "pre_gradient does not work on every number by itself",
    ),
    "gradient of another dtype": (
        wrong(pre_gradient=lambda self, g, f: (g * (f > 0)).double()), "pre_gradient turns torch.float32 into",
    ),
    "only right in float64": (
        wrong(pre_gradient=lambda self, g, f: g * (f > (0 if f.dtype == torch.float64 else 0.5))),
        r"pre_gradient is not what autograd finds \(torch.float32\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_are_found(name: str) -> None:
    activation, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        check_sparse_activation(activation)


def test_one_that_declares_nothing() -> None:
    with pytest.raises(AssertionError, match="declares no sparse support: it needs in_place"):
        check_sparse_activation(torch.relu)
