"""What an SAE knows of itself, and what a training step is given and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import attrs
import torch
from torch import Tensor

from saekit.site import Site

__all__ = ["SAEInfo", "StepInput", "StepOutput", "is_scale"]

_SCALED = "expected_average_only_in"


def is_scale(value: object) -> bool:
    """Whether activations can be multiplied by ``value``: a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@attrs.frozen(kw_only=True)
class SAEInfo:
    """Where an SAE comes from and where it belongs."""

    architecture: str = ""
    """The qualified key of the plugin that made it."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """The architecture's options as plain data, every plugin by its qualified key."""
    site: Site | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    """Model name, dataset, context size, token policies and the like: what decides what the SAE is fed."""

    @property
    def scale_is_unknown(self) -> bool:
        """Whether the SAE was trained on scaled activations, and nobody knows by which factor."""
        return self.metadata.get("normalize_activations") in (True, _SCALED)

    def with_scale(self, scale: float | None) -> Self:
        """For weights that a factor was folded into, where it was unknown until now or nothing was said; None: unknown.

        A factor of 1 says nothing.
        """
        if scale is None:
            return attrs.evolve(self, metadata={**self.metadata, "normalize_activations": _SCALED})
        if scale == 1:
            return self
        left = {name: value for name, value in self.metadata.items() if name != "normalize_activations"}
        return attrs.evolve(self, metadata={**left, "activation_scale": scale})

    def lines(self) -> list[str]:
        """What is known, a line each, for people."""
        known = [("architecture", self.architecture), ("site", self.site), *self.metadata.items()]
        return [f"{name}={value!r}" for name, value in known if value not in ("", None)]


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
