"""Which transformer_lens is installed, and what models are called there.  A helper of plugins, not a plugin."""

from __future__ import annotations

import difflib
from importlib.metadata import version

from saekit.garbage import uncollected

__all__ = ["has_hooked_transformer", "is_known", "lens_version", "near_names", "official_name"]


def lens_version() -> str:
    """Of transformer_lens, without importing it, which takes seconds."""
    return version("transformer-lens")


def has_hooked_transformer() -> bool:
    """Whether it has HookedTransformer: since its 4.0 there is the bridge alone."""
    return int(lens_version().partition(".")[0]) < 4


def official_name(name: str) -> str:
    """What the Hub calls a model that transformer_lens has another name for."""
    if "/" in name:
        return name
    with uncollected():
        from transformer_lens.supported_models import MODEL_ALIASES
    return next((official for official, others in MODEL_ALIASES.items() if name in others), name)


def _known(others: tuple[str, ...]) -> set[str]:
    with uncollected():
        from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
    return {*others, *OFFICIAL_MODEL_NAMES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)}


def is_known(name: str, *others: str) -> bool:
    """Whether ``name`` is a model of transformer_lens, or one of ``others``."""
    return name in _known(others)


def near_names(name: str, *others: str) -> list[str]:
    """Models of transformer_lens, or of ``others``, that are spelled like ``name``; none if it is one of them."""
    return [] if is_known(name, *others) else difflib.get_close_matches(name, _known(others), n=3)
