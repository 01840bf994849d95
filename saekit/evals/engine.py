"""The one pass over contexts in which every eval that accumulates sees what it asks for, of all SAEs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.abilities import Accumulates
from saekit.evals.seen import Needs
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import TokenChoice, special_ids

__all__ = ["Mask", "Measured", "measure"]

Mask: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""The positions that may count: ``[n, t]`` bool of all contexts, or a function of their tokens ``[b, t]``."""


@attrs.frozen(eq=False)
class Measured:
    """An SAE that is measured."""

    sae: SAEModule
    sites: Sites
    evals: Mapping[str, Accumulates]
    tokens: TokenChoice = TokenChoice()
    """Those that count."""

    @classmethod
    def of(cls, sae: SAEModule, sites: Sites, evals: Mapping[str, Accumulates], backend: ModelBackend) -> Self:
        """With the tokens that the SAE says."""
        return cls(sae, sites, evals, TokenChoice.of_metadata(sae.info.metadata, special_ids(backend)))

    @property
    def needs(self) -> Needs:
        """What all evals ask for."""
        whole = Needs(batch_size=1 << 30)
        for one in self.evals.values():
            whole = whole | one.needs
        return whole


def measure(
    subjects: Sequence[Measured],
    *,
    backend: ModelBackend,
    contexts: Tensor,
    mask: Mask | None = None,
    first: int = 0,
    means_from: Tensor | None = None,
    report: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """What each eval of each of ``subjects`` has summed up of ``contexts [n, t]``: of each its states by name.

    A batch of contexts is forwarded once as it is, once with zeros and, if asked, once with the mean at each distinct
    set of targets, and once with what each SAE gives.  Positions that do not count keep their activations, and are left
    out of every sum.  ``first`` is the number of the first context, for parts of a whole; ``means_from`` are the
    contexts that means are read from (by default the first of ``contexts``); ``report`` is told of every batch how many
    tokens it had.
    """
    raise NotImplementedError
