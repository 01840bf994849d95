"""The hook that a released SAE reads, as far as its id or its path says it: nothing is fetched for it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from saekit.released import Release, ReleasedSAE

__all__ = ["hook_of"]

_RULES = "release_hooks.json"
"""Beside this file: for a loader, what a path with its repository looks like, and the hook that this means."""
_ID = re.compile(
    r"(?:blocks\.\d+\.(?:attn\.|mlp\.|ln\d\.)?)?hook_(?:resid_(?:pre|mid|post)|attn_out|mlp_out|mlp_in|z|embed)"
)


@cache
def _rules() -> Sequence[tuple[str, re.Pattern[str], str]]:
    rules = json.loads(Path(__file__).with_name(_RULES).read_text(encoding="utf-8"))
    return [(loader, re.compile(pattern), hook) for loader, pattern, hook in rules]


def hook_of(release: Release, sae: ReleasedSAE) -> str | None:
    """The hook that ``sae`` reads; None: neither its id nor its path says so."""
    if "hook_name" in release.overrides:
        return str(release.overrides["hook_name"])
    path = f"{release.place}/{sae.path}"
    for loader, pattern, hook in _rules():
        if loader == release.loader and (said := pattern.search(path)):
            return hook.format(*said.groups())
    said = _ID.match(sae.id)
    return None if said is None else said[0]
