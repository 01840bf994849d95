"""Asking strangers' loaders: what fails in one says whose it is, and stops no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import attrs

from saekit.cautions import warn
from saekit.errors import PluginFailedError, PluginWarning
from saekit.plugins.building import blamed, built, returned
from saekit.plugins.choice import Choice
from saekit.plugins.registry import Registered
from saekit.protocols import PretrainedLoader
from saekit.reasons import error_text
from saekit.saved import PretrainedSAE, SAEFiles

__all__ = ["Score", "read_with", "recognized", "usable"]


Score: TypeAlias = tuple[float, Registered]
"""How sure a loader is, above 0 and up to 1."""


def usable(item: Registered) -> bool:
    """Whether the loader can be tried as it is: nothing is missing and no option is required."""
    return not item.missing() and all(field.default is not attrs.NOTHING for field in attrs.fields(item.entry.config))


def recognized(items: Iterable[Registered], files: SAEFiles) -> tuple[list[Score], list[str]]:
    """The loaders that say that ``files`` are of their format, the surest first, and texts about those that failed.

    Where one recognizes the files, the failures are warnings.
    """
    found: list[Score] = []
    failed = []
    for item in items:
        try:
            loader = built(item, None)
            with blamed(item, "detects"):
                said = loader.detects(files.unopened())
                score = float(bool(said)) if isinstance(said, bool) or not isinstance(said, int | float) else said
            if not 0 <= score <= 1:
                raise returned(item, "detects", said, "expected true, false or a number from 0 to 1")
            if score:
                found.append((score, item))
        except Exception as error:
            notes = getattr(error, "__notes__", ()) if not isinstance(error, PluginFailedError) else ()
            failed.append(" ".join([error_text(error), *notes]))
    if found:
        for text in failed:
            warn(text, PluginWarning)
    return sorted(found, key=lambda one: -one[0]), failed


def read_with(choice: Choice[PretrainedLoader], files: SAEFiles) -> PretrainedSAE:
    """What the loader that was chosen reads from ``files``; its failures name it."""
    item, loader = choice.item, choice.build()
    with blamed(item, "load"):
        read = loader.load(files)
    if not isinstance(read, PretrainedSAE):
        raise returned(item, "load", read, "expected a saekit.PretrainedSAE")
    return read
