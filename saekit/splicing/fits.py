"""Whether an SAE fits a model, found out before anything long runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs
import torch

from saekit.abilities import HasModel
from saekit.backends.base import no_hook
from saekit.cautions import warn
from saekit.data.stream import PROBED, probe
from saekit.errors import ConfigError, ModelError
from saekit.protocols import ModelBackend
from saekit.sae.placing import NO_PLACE, check_ports
from saekit.site import Site, Sites
from saekit.splicing.doubts import doubts_of_fit
from saekit.splicing.places import own_hook, undisturbed
from saekit.weights import check_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae.module import SAEModule

__all__ = ["check_fits", "sites_of"]

_LOOKED_AT = 32  # hooks, for one of the width that was expected
_known: WeakKeyDictionary[object, dict[Site, int]] = WeakKeyDictionary()
"""By models, the widths of sites that were found."""


def check_fits(
    sae: SAEModule,
    backend: ModelBackend,
    sites: Sites | Site | str | None = None,
    *,
    prepend_bos: bool | None = None,
    masked: bool | None = False,
) -> Sites:
    """The sites of the model at which ``sae`` reads and writes: those that it names, unless there are others.

    Where the model lacks a hook of that name, its backend is asked for the one that means the same
    (:class:`saekit.abilities.TranslatesHooks`).  ``prepend_bos`` is whether contexts begin with BOS now; None: that is
    not known.  ``masked`` is whether a mask says which tokens count; None: none can be given.  The first time that a
    site is asked for, the model runs on a few tokens, which no hook of others sees.

    Raises :class:`saekit.errors.ModelError` for a hook that the model lacks, :class:`saekit.errors.ConfigError` for
    sites that are not those of ``sae`` by number, heads or width, and :class:`saekit.errors.SAEFormatError` for weights
    that are not finite.  What looks wrong, but runs, is a ``UserWarning``: see :func:`saekit.splicing.doubts_of_fit`.
    """
    found = fitting_sites(sae, backend, sites)
    for text in doubts_of_fit(sae, backend, sites=found, prepend_bos=prepend_bos, masked=masked):
        warn(text, UserWarning)
    return found


def fitting_sites(sae: SAEModule, backend: ModelBackend, sites: Sites | Site | str | None = None) -> Sites:
    """The same errors and sites without the warnings, for which more must be known."""
    wanted = sites_of(sae, sites)
    check_ports(sae.ports, wanted)
    check_tensors({name: _as_it_lies(value) for name, value in sae.named_parameters()}, f"the SAE at {wanted.name}")
    found = _of_model(wanted, backend)
    _check_widths(sae, found, backend)
    return found


def _as_it_lies(value: Tensor) -> Tensor:
    """``value``, turned if its memory is: only of what lies in order it is remembered that it is finite."""
    return value.T if value.ndim == 2 and not value.is_contiguous() and value.T.is_contiguous() else value


# ---- sites


def sites_of(sae: SAEModule, sites: Sites | Site | str | None, option: str = "sites") -> Sites:
    """Those that are asked for, or those that ``sae`` names; :class:`ConfigError` where there are none."""
    found = Sites.of(sites) or sae.info.sites
    if found is None:
        verb = "are" if option.endswith("s") else "is"
        raise ConfigError([(option, f"{verb} missing: {NO_PLACE}; say it here, or for good: sae.site = HOOK")])
    return found


def _of_model(sites: Sites, backend: ModelBackend) -> Sites:
    """``sites`` by the names of the model's own hooks."""
    names = frozenset(backend.hook_names())
    own: dict[str, str] = {}
    lacking = []
    for hook in dict.fromkeys(site.hook_name for site in sites.all):
        found = own_hook(hook, backend, names)
        if found is None:
            lacking.append(str(no_hook(backend, hook)))
        else:
            own[hook] = found
    if lacking:
        raise ModelError("\n".join(lacking))
    if all(hook == found for hook, found in own.items()):
        return sites
    inputs, targets = (
        tuple(attrs.evolve(site, hook_name=own[site.hook_name]) for site in some)
        for some in (sites.inputs, sites.targets)
    )
    return Sites(inputs, targets)


# ---- widths


def _check_widths(sae: SAEModule, sites: Sites, backend: ModelBackend) -> None:
    known = _widths(sites, backend)
    problems = []
    for what, named, widths in (
        ("d_in", sites.inputs, sae.ports.inputs),
        ("d_out", sites.targets, {} if sites.same else sae.ports.targets),
    ):
        for site, width in zip(named, widths.values(), strict=False):
            if known[site] != width:
                instead = _instead(site, width, backend)
                found = f"is {known[site]} wide in {backend.name!r}, and the SAE expects {width} there"
                problems.append((site.name, f"{found} ({what} is {sum(widths.values())}){instead}"))
    if problems:
        raise ConfigError(problems, "the SAE in this model")


def _widths(sites: Sites, backend: ModelBackend) -> Mapping[Site, int]:
    """Of each of ``sites``, and of others that were asked for."""
    try:
        known = _known.setdefault(backend.model if isinstance(backend, HasModel) else backend, {})
    except TypeError:  # an object that cannot be a key
        known = {}
    if unknown := [site for site in sites.all if site not in known]:
        with undisturbed(backend):
            known.update((site, width) for site, (width, _) in probe(backend, unknown).items())
    return known


def _instead(site: Site, width: int, backend: ModelBackend) -> str:
    """Where the model has vectors of that width, as a sentence; nothing where it has none nearby."""
    with undisturbed(backend):
        shapes = dict(_shapes(backend, _like(site.hook_name, backend)))
    here = shapes.pop(site.hook_name, [])
    if len(here) == 2 and width == here[1] and site.hook_head_index is None:
        return f". One head of it is so wide: give hook_head_index, 0 to {here[0] - 1}"
    if len(here) == 2 and width == here[0] * here[1]:
        return ". All heads of it are: leave hook_head_index out"
    fitting = [name for name, shape in shapes.items() if width == _product(shape)][:3]
    return f". So wide are {', '.join(map(repr, fitting))}" if fitting else ""


def _product(shape: Sequence[int]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]


def _like(hook: str, backend: ModelBackend) -> list[str]:
    """The hooks whose names are most like ``hook``, itself first."""
    matcher = difflib.SequenceMatcher(b=hook, autojunk=False)

    def likeness(name: str) -> float:
        matcher.set_seq1(name)
        return matcher.ratio()

    return sorted(backend.hook_names(), key=likeness, reverse=True)[:_LOOKED_AT]


def _shapes(backend: ModelBackend, names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """What hooks hold for each token, ``[d]`` or ``[head, d_head]``; without those that do not run, or hold others."""
    tokens = torch.zeros(PROBED, dtype=torch.long)
    try:
        held = backend.run(tokens, read=names).held
    except ModelError:
        if len(names) > 1:
            half = len(names) // 2
            yield from _shapes(backend, names[:half])
            yield from _shapes(backend, names[half:])
        return
    for name in names:
        shape = held[name].shape
        if shape[:2] == tokens.shape and len(shape) in (3, 4):
            yield name, list(shape[2:])
