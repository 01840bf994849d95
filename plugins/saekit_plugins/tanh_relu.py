"""Activation function ``tanh-relu``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl
from saekit.protocols import ActivationFunction

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True)
class TanhReluConfig:
    """``tanh(max(pre, 0))``; no options."""


@hookimpl
def saekit_register_activation_functions() -> Iterable[Entry]:
    yield Entry("tanh-relu", TanhReluConfig, _build, summary="tanh(max(pre, 0))")


def _build(config: TanhReluConfig) -> ActivationFunction:
    def tanh_relu(pre: Tensor) -> Tensor:
        return pre.relu().tanh()

    return tanh_relu
