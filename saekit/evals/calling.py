"""How evals are called, wherever it is: as strangers, who compute numbers and no gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saekit.abilities import Accumulates
from saekit.ambient import ambient
from saekit.evals.engine import measure
from saekit.evals.measured import Guard, Measured
from saekit.protocols import Eval, ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.tokens import TokenChoice, special_ids

__all__ = ["all_called", "called"]


def called(measure: Any, sae: SAEModule, *, backend: ModelBackend, sites: Sites, contexts: Tensor | None) -> Any:
    """What the eval ``measure`` finds of ``sae``; see :class:`saekit.protocols.Eval`.

    Gradients are off, since what hooks hold is not for autograd; an eval that wants them turns them on, and asks the
    model for them (``grad=True``).  What it sets and leaves of torch's own state, nobody sees.
    """
    with ambient(), torch.no_grad():
        return measure(sae, backend=backend, sites=sites, contexts=contexts)


def all_called(
    evals: Mapping[str, Eval],
    sae: SAEModule,
    *,
    backend: ModelBackend,
    sites: Sites,
    contexts: Tensor | None,
    mask: Tensor | None = None,
    guard: Guard = nullcontext,
) -> dict[str, Any]:
    """What each of ``evals`` finds of ``sae``, by name; those that accumulate share each forward of the model.

    Tokens that do not count for ``sae`` are left out, and those where ``mask [n, t]`` is false.  Of these they are
    numbers with standard errors, ``NAME_se``.  ``guard(name)`` surrounds what each does.
    """
    together = {name: one for name, one in evals.items() if contexts is not None and isinstance(one, Accumulates)}
    found: dict[str, Any] = dict.fromkeys(evals)
    if together and contexts is not None:
        tokens = TokenChoice.of_metadata(sae.info.metadata, special_ids(backend))
        subject = Measured(sae, sites, together, tokens, guard)
        (sums,) = measure([subject], backend=backend, contexts=contexts, mask=mask)
        for name, one in together.items():
            with guard(name), ambient(), torch.no_grad():
                found[name] = one.result(sums[name]).numbers()
    for name in [name for name in evals if name not in together]:
        with guard(name):
            found[name] = called(evals[name], sae, backend=backend, sites=sites, contexts=contexts)
    return found
