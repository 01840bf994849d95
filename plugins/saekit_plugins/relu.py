"""Activation function ``relu``."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.protocols import ActivationFunction


@attrs.frozen(kw_only=True)
class ReluConfig:
    """``max(pre, 0)``; no options."""


@hookimpl
def saekit_register_activation_functions() -> Iterable[Entry]:
    yield Entry("relu", ReluConfig, _build, summary="max(pre, 0)")


def _build(config: ReluConfig) -> ActivationFunction:
    import torch

    return torch.relu
