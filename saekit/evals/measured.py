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

__all__ = ["Guard", "Measured", "allowed_in", "checked_contexts", "checked_mask"]

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
    outline: SAEModule | None = None
    """What evals are started with, where ``sae`` is this process's part of the features: see
    :class:`saekit.abilities.SharesContexts`."""

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


def checked_contexts(contexts: Any) -> Tensor:
    """``contexts [n, t]``: token ids of any whole type, in a tensor, an array or lists; else :class:`ConfigError`."""
    try:
        found = torch.as_tensor(contexts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError([("contexts", f"must be token ids [n, context_size]: {error}")]) from error
    if found.ndim != 2 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        what = f"found {list(found.shape)}, {found.dtype}"
        raise ConfigError([("contexts", f"must be token ids [n, context_size], whole numbers; {what}")])
    return found if found.dtype in (torch.int32, torch.int64) else found.long()


def checked_mask(mask: Any, contexts: Tensor) -> Mask | None:
    """``mask``, of which an array or lists must be bool and as large as ``contexts``; else :class:`ConfigError`."""
    if mask is None or callable(mask):
        return mask  # type: ignore[no-any-return]
    expected = f"must say true or false of each token: bool, {list(contexts.shape)} as the contexts"
    try:
        found = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError([("mask", f"{expected}; or be a function of tokens: {error}")]) from error
    if found.shape != contexts.shape or found.dtype != torch.bool:
        raise ConfigError([("mask", f"{expected}; found {list(found.shape)}, {found.dtype}")])
    return found


def allowed_in(mask: Mask | None, tokens: Tensor, rows: slice) -> Tensor | None:
    """``[b, t]`` bool: what ``mask`` says of the contexts that ``rows`` of all are."""
    if mask is None:
        return None
    found = mask[rows] if isinstance(mask, Tensor) else mask(tokens)
    if not isinstance(found, Tensor) or found.shape != tokens.shape or found.dtype != torch.bool:
        shown = f"{list(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError([("mask", f"must say true or false of each token, {list(tokens.shape)} here; found {shown}")])
    return found.to(tokens.device)
