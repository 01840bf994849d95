"""Whether an activation function is what it declares; see :func:`saekit.testing.check_sparse_activation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from saekit.abilities import SparseActivation
from saekit.protocols import ActivationFunction

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_sparse_activation"]

_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.05}
"""By dtype: how far two ways to compute one thing may be apart.  A wrong formula is further off in float64."""
_SHAPES = ((), (0,), (0, 33), (1,), (3, 5, 7), (512, 513))


def check_sparse_activation(activation: ActivationFunction) -> None:
    """Verify that ``activation`` is what it declares by having the methods of a ``SparseActivation``.

    :class:`AssertionError` says what is not as it should be.  Numbers are compared with autograd's, in float64, float32
    and bfloat16, and may differ in their last digits; zeros must be exact.  Shapes from a single number to many are
    tried, empty ones too.
    """
    import torch

    assert isinstance(activation, SparseActivation), (
        f"{activation!r} declares no sparse support: it needs in_place(pre) and pre_gradient(gradient, features)"
    )
    with torch.inference_mode(False), torch.enable_grad():
        for dtype, tolerance in _TOLERANCES.items():
            check = _Check(activation, getattr(torch, dtype), tolerance)
            check.numbers()
            for shape in _SHAPES if dtype == "float32" else _SHAPES[:-1]:
                check.shape(shape)


@attrs.frozen
class _Check:
    activation: Any
    dtype: Any
    tolerance: float

    def numbers(self) -> None:
        """The formulas."""
        import torch

        pre = _numbers(self.dtype)
        found, expected, upstream = self._by_autograd(pre)
        self._must(not bool(found.isnan().any()), "it is not a number somewhere")
        self._must(bool((found >= 0).all()), "it is negative somewhere")
        self._must(not bool(found[pre <= 0].any()), "it is not zero wherever pre <= 0")
        self._must(not bool(expected[pre <= 0].any()), "its derivative is not zero wherever pre <= 0")
        alone = torch.stack([self._tried("calling it", self.activation, one) for one in pre.flatten()])
        self._must(self._close(alone.detach().reshape(pre.shape), found), "it does not work on every number by itself")
        gradient = self._pre_gradient(upstream, found)
        self._must(self._close(gradient, expected), "pre_gradient is not what autograd finds")
        inactive = self._pre_gradient(torch.ones_like(found), torch.zeros_like(found))
        self._must(not bool(inactive.any()), "pre_gradient is not zero wherever features are")
        flat = self._pre_gradient(upstream.flatten(), found.flatten())
        self._must(self._close(flat, gradient.flatten()), "pre_gradient does not work on every number by itself")
        written = self._in_place(pre.clone())
        self._must(self._close(written, found), "in_place is not what calling it returns")
        self._must(not bool(written[pre <= 0].any()), "in_place is not zero wherever pre <= 0")
        far = self._tried("calling it", self.activation, pre.new_tensor([1e4, -1e4])).detach()
        self._must(bool(far[0] >= 0) and not bool(far[1]), "it is not a number at 10,000, or not zero at -10,000")

    def shape(self, shape: tuple[int, ...]) -> None:
        """That any shape is kept."""
        import torch

        pre = (torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3).to(self.dtype)
        found, expected, upstream = self._by_autograd(pre)
        where = f"for the shape {list(shape)}"
        self._must(self._close(self._in_place(pre), found), f"in_place is not what calling it returns {where}")
        gradient = self._pre_gradient(upstream, found)
        self._must(self._close(gradient, expected), f"pre_gradient is not what autograd finds {where}")

    def _by_autograd(self, pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, the gradient to ``pre``, and the gradient to the features that it comes from; of one shape."""
        import torch

        leaf = pre.clone().requires_grad_()
        features = self._tried("calling it", self.activation, leaf)
        self._must(torch.equal(leaf.detach(), pre), "calling it changes its argument")
        self._kept("it", features, pre)
        upstream = torch.randn(pre.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        upstream = upstream.to(self.dtype)
        (expected,) = self._tried("its derivative", torch.autograd.grad, features, leaf, upstream)
        found = features.detach()
        rounded = (found == 0) & (pre > 0) & (pre <= torch.finfo(self.dtype).eps)  # a feature lost in the last digit
        return found, expected.masked_fill(rounded, 0), upstream

    def _in_place(self, pre: Tensor) -> Tensor:
        address = pre.data_ptr()
        written: Tensor = self._tried("in_place", self.activation.in_place, pre)
        self._kept("in_place", written, pre)
        self._must(written.data_ptr() == address, "in_place does not write over its argument")
        return written

    def _pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        import torch

        kept = features.clone()
        found: Tensor = self._tried("pre_gradient", self.activation.pre_gradient, gradient.clone(), features)
        self._must(torch.equal(features, kept), "pre_gradient changes the features")
        self._kept("pre_gradient", found, features)
        return found

    def _kept(self, what: str, found: Any, like: Tensor) -> None:
        import torch

        self._must(isinstance(found, torch.Tensor), f"{what} returns {type(found).__name__}, not a tensor")
        self._must(found.shape == like.shape, f"{what} turns the shape {list(like.shape)} into {list(found.shape)}")
        self._must(found.dtype == like.dtype, f"{what} turns {like.dtype} into {found.dtype}")

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        """Whether all are equal but for the last digits, of their own or of the largest one's."""
        if not expected.numel():
            return True
        found, expected = found.double(), expected.double()
        size = expected.abs()
        near = (found - expected).abs() <= self.tolerance * (size + size[size < float("inf")].max())
        return bool((near | (found == expected)).all())

    def _tried(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            shapes = " and ".join(str(list(argument.shape)) for argument in arguments if hasattr(argument, "shape"))
            message = f"{what} raises {type(error).__name__}: {error} (for the shape {shapes}, {self.dtype})"
            raise AssertionError(message) from error

    def _must(self, fine: bool, message: str) -> None:
        assert fine, f"{message} ({self.dtype})"


def _numbers(dtype: Any) -> Tensor:
    """Pre-activations ``[64, 33]`` of both signs: zeros, the smallest, some far out, and none where formulas change.

    Thresholds of activations lie at round numbers, where either slope is right.
    """
    import torch

    pre = (torch.randn(64, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3).to(dtype)
    pre[(pre * 4).frac() == 0] = 0.7
    tiny = torch.finfo(dtype).tiny
    pre[0, :8] = torch.tensor([0.0, -0.0, tiny, -tiny, 47.3, -47.3, 0.01, -0.01], dtype=torch.float64).to(dtype)
    return pre
