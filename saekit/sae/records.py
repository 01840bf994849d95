"""What an SAE knows of itself, and what a training step is given and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from saekit.site import Site

__all__ = ["SAEInfo", "StepInput", "StepOutput"]


@attrs.frozen(kw_only=True)
class SAEInfo:
    """Where an SAE comes from and where it belongs."""

    architecture: str = ""
    """The qualified key of the plugin that made it."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """The architecture's options as plain data, every plugin by its qualified key."""
    site: Site | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """Model name, dataset, context size, token policies and the like."""


@attrs.frozen
class StepInput:
    """What a training step may depend on beside its batch."""

    step: int
    """From 0."""
    generator: torch.Generator
    """For whatever the step draws."""
    dead: Tensor | None = None
    """``[d_sae]`` bool: the features that have not fired for the dead-feature window."""


class StepOutput(NamedTuple):
    """What a training step reports.  Tensors stay on the device; nothing waits for them."""

    loss: Tensor
    losses: Mapping[str, Tensor]
    """The terms by their logged name, such as ``mse_loss``."""
    output: Tensor
    """``[n, d_in]``, detached."""
    fired: Tensor
    """``[d_sae]``: rows on which each feature was above zero."""
    coefficients: Mapping[str, float | Tensor] = {}
    """Coefficients at this step, such as ``l1_coefficient``; tensors are scalars."""
