"""The hook that a released SAE reads, as far as its release, its id or its path says it: nothing is fetched for it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from saekit.released import Release, ReleasedSAE

__all__ = ["hook_of", "with_hooks"]

_ID = re.compile(
    r"(?:blocks\.\d+\.(?:attn\.|mlp\.|ln\d\.)?)?hook_(?:resid_(?:pre|mid|post)|attn_out|mlp_out|mlp_in|z|embed)"
)


def hook_of(release: Release, sae: ReleasedSAE) -> str | None:
    """The hook that ``sae`` reads; None: neither the release nor the id says so."""
    if "hook_name" in release.overrides:
        return str(release.overrides["hook_name"])
    path = f"{release.place}/{sae.path}"
    for pattern, hook in release.hooks:
        if said := re.search(pattern, path):
            return hook.format(*said.groups())
    said = _ID.match(sae.id)
    return None if said is None else said[0]


def with_hooks(releases: Iterable[Release], standard: str) -> list[Release]:
    """Those that do not say how paths name hooks get it from others of their loader: of their source, or of
    ``standard``."""
    found = [*releases]
    known: dict[tuple[str, str | None], dict[tuple[str, ...], None]] = {}
    for one in found:
        known.setdefault((one.source, one.loader), {}).update(dict.fromkeys(map(tuple, one.hooks)))
    return [_with(one, known.get((one.source, one.loader)) or known.get((standard, one.loader))) for one in found]


def _with(release: Release, hooks: Iterable[tuple[str, ...]] | None) -> Release:
    if release.hooks or release.loader is None or not hooks:
        return release
    return attrs.evolve(release, hooks=tuple(hooks))
