"""An SAE that is measured, and where in its contexts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.abilities import Accumulates
from saekit.errors import ConfigError
from saekit.measuring import Needs
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import Mask, TokenChoice, special_ids

__all__ = ["Guard", "Measured", "allowed_in"]

Guard: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Surrounds what an eval of this name does, to say whose fault it is if it fails."""


@attrs.frozen(eq=False)
class Measured:
    """An SAE that is measured."""

    sae: SAEModule
    sites: Sites
    evals: Mapping[str, Accumulates]
    tokens: TokenChoice = attrs.field(factory=TokenChoice)
    """Those that count."""
    guard: Guard = lambda name: nullcontext()

    @classmethod
    def of(cls, sae: SAEModule, sites: Sites, evals: Mapping[str, Accumulates], backend: ModelBackend) -> Self:
        """With the tokens that the SAE says."""
        return cls(sae, sites, evals, TokenChoice.of_metadata(sae.info.metadata, special_ids(backend)))

    @property
    def needs(self) -> Needs:
        """What all evals ask for."""
        return functools.reduce(Needs.__or__, (one.needs for one in self.evals.values()), Needs(batch_size=1 << 30))

    @property
    def targets(self) -> Sites:
        """The targets alone: what is put there is the same for all SAEs that write there."""
        return Sites(tuple(sorted(self.sites.targets, key=lambda site: site.name)))


def allowed_in(mask: Mask | None, tokens: Tensor, rows: slice) -> Tensor | None:
    """``[b, t]`` bool: what ``mask`` says of the contexts that ``rows`` of all are."""
    if mask is None:
        return None
    found = mask[rows] if isinstance(mask, Tensor) else mask(tokens)
    if not isinstance(found, Tensor) or found.shape != tokens.shape or found.dtype != torch.bool:
        shown = f"{list(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError([("mask", f"must say true or false of each token, {list(tokens.shape)} here; found {shown}")])
    return found.to(tokens.device)
