"""How an eval is called, wherever it is: as a stranger, who computes numbers and no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites

__all__ = ["called"]


def called(measure: Any, sae: SAEModule, *, backend: ModelBackend, sites: Sites, contexts: Tensor | None) -> Any:
    """What the eval ``measure`` finds of ``sae``; see :class:`saekit.protocols.Eval`.

    Gradients are off, since what hooks hold is not for autograd; an eval that wants them turns them on, and asks the
    model for them (``grad=True``).  What it sets and leaves of torch's own state, nobody sees.
    """
    with ambient(), torch.no_grad():
        return measure(sae, backend=backend, sites=sites, contexts=contexts)
