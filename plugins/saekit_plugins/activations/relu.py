"""Activation function ``relu``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class ReluConfig:
    """``max(pre, 0)``; no options."""


@hookimpl
def saekit_register_activation_functions() -> Iterable[Entry]:
    yield Entry("relu", ReluConfig, _build, summary="max(pre, 0)")


class Relu:
    """Has sparse support (:class:`saekit.abilities.SparseActivation`)."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        from saekit.kernels import relu_gradient_

        return relu_gradient_(gradient, features)


def _build(config: ReluConfig) -> Relu:
    return Relu()
