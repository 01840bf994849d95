"""Activation function ``tanh-relu``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class TanhReluConfig:
    """``tanh(max(pre, 0))``; no options."""


@hookimpl
def saekit_register_activation_functions() -> Iterable[Entry]:
    yield Entry("tanh-relu", TanhReluConfig, _build, summary="tanh(max(pre, 0))")


class TanhRelu:
    """Has sparse support (:class:`saekit.abilities.SparseActivation`)."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu().tanh()

    def in_place(self, pre: Tensor) -> Tensor:
        return pre.relu_().tanh_()

    def pre_gradient(self, gradient: Tensor, features: Tensor) -> Tensor:
        slope = (features > 0).to(features) - features.square()  # 1 - tanh², and 0 where the feature is
        return gradient.mul_(slope)


def _build(config: TanhReluConfig) -> TanhRelu:
    return TanhRelu()
