"""What an activation function promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit.abilities import SparseActivation
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.sparse import check_sparse_activation

if TYPE_CHECKING:
    from torch import Tensor

CHECKS = Checks()
_SHAPES = ((), (5,), (0, 4), (3, 5), (2, 3, 4))
_TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}


def _numbers(*shape: int, dtype: str = "float64") -> Tensor:
    """Pre-activations, none where formulas change: thresholds lie at round numbers, where either slope is right."""
    import torch

    pre = torch.randn(shape, generator=seeded(), dtype=torch.float64) * 3
    pre = pre.to(getattr(torch, dtype))
    return torch.where((pre * 4).frac() == 0, pre.new_tensor(0.7), pre)


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options, and keeps to its protocol."""
    subject.build()


@CHECKS.add
def shape(subject: Subject) -> None:
    """Any shape, and every type, is kept; what it is given stays as it is."""
    import torch

    activation = subject.build()
    for dtype in _TOLERANCES:
        for size in _SHAPES:
            if not size and isinstance(activation, torch.nn.Module):
                continue
            pre = _numbers(*size, dtype=dtype)
            given = pre.clone()
            found = activation(given)
            must(isinstance(found, torch.Tensor), f"it returns {type(found).__name__}, expected a tensor")
            must(
                found.shape == pre.shape and found.dtype == pre.dtype,
                f"it turns {list(pre.shape)} of {pre.dtype} into {list(found.shape)} of {found.dtype}",
            )
            must_be_equal("what it was given, afterwards", given, pre)


@CHECKS.add
def finite(subject: Subject) -> None:
    """It gives finite numbers, far out, too, and the same for the same."""
    import torch

    activation = subject.build()
    for dtype in ("float64", "float32"):
        pre = torch.tensor([[-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4]], dtype=getattr(torch, dtype))
        found = activation(pre)
        must(found.isfinite().all(), f"at {pre.tolist()[0]} it is {found.tolist()[0]}")
        must_be_equal("the second call", activation(pre.clone()), found)


@CHECKS.add
def gradient(subject: Subject) -> None:
    """Autograd's derivative is that of small changes in float64, and nearly the same in float32 and bfloat16."""
    import torch

    activation = subject.build()
    pre = _numbers(6, 9).requires_grad_()
    try:
        torch.autograd.gradcheck(activation, (pre,))
    except Exception as error:
        raise Fault(f"in float64 autograd's derivative is not that of small changes: {error_text(error)}") from error
    for dtype in ("float32", "bfloat16"):
        rounded = _numbers(6, 9, dtype=dtype)
        expected = _derivative(activation, rounded.double())
        must_agree(f"the derivative in {dtype}", _derivative(activation, rounded), expected, _TOLERANCES[dtype])


def _derivative(activation: Any, pre: Tensor) -> Tensor:
    import torch

    pre = pre.clone().requires_grad_()
    upstream = torch.randn(pre.shape, generator=seeded(1), dtype=torch.float64)
    found: Tensor = torch.autograd.grad(activation(pre), pre, upstream.to(pre.dtype))[0]
    return found


@CHECKS.add
def sparse(subject: Subject) -> None:
    """Where it declares sparse support, it is as :func:`saekit.testing.check_sparse_activation` says."""
    activation = subject.build()
    there = [name for name in ("in_place", "pre_gradient") if callable(getattr(activation, name, None))]
    if not isinstance(activation, SparseActivation):
        must(not there, f"it has {' and '.join(there)} alone; sparse support is in_place and pre_gradient")
        raise NotTried("it declares no sparse support")
    try:
        check_sparse_activation(activation)
    except AssertionError as error:
        raise Fault(str(error)) from error
