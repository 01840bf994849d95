"""Places in a model by the names that an SAE has for them, and whether two are one."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch

from saekit.abilities import RunsUndisturbed, TranslatesHooks
from saekit.data.stream import PROBED
from saekit.errors import SaekitError
from saekit.protocols import ModelBackend
from saekit.site import Site

__all__ = ["hold_the_same", "own_hook", "own_site", "undisturbed"]


def undisturbed(backend: ModelBackend) -> AbstractContextManager[None]:
    """While the context is open, no hook of others is met: for a look at the model itself."""
    return backend.undisturbed() if isinstance(backend, RunsUndisturbed) else nullcontext()


def own_hook(hook: str, backend: ModelBackend, names: Collection[str]) -> str | None:
    """The hook of the model that ``hook`` means; None: there is none.  ``names`` are all that it has."""
    if hook in names:
        return hook
    return backend.hook_like(hook) if isinstance(backend, TranslatesHooks) else None


def own_site(site: Site, backend: ModelBackend) -> Site | None:
    """``site`` by the name of the model's own hook; None where it has none."""
    found = own_hook(site.hook_name, backend, frozenset(backend.hook_names()))
    return None if found is None else attrs.evolve(site, hook_name=found)


def hold_the_same(one: Site, other: Site, backend: ModelBackend) -> bool:
    """Whether the model holds the same vectors at both, as one block's output and the next one's input do."""
    if one == other:
        return True
    tokens = torch.arange(PROBED[0] * PROBED[1]).reshape(PROBED) % backend.d_vocab
    try:
        with undisturbed(backend):
            held = backend.run(tokens, read={one.hook_name, other.hook_name}).held
        here, there = (site.extract(held[site.hook_name]) for site in (one, other))
    except SaekitError:  # one of them does not run, or has no such head
        return False
    return here.shape == there.shape and torch.allclose(here, there.to(here), rtol=1e-5, atol=1e-6)
