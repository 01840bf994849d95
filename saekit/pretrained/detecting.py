"""Asking strangers' loaders: what fails in one says whose it is, and stops no other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from saekit.errors import PluginFailedError, PluginWarning
from saekit.plugins.building import blamed, built, returned
from saekit.plugins.choice import Choice
from saekit.plugins.registry import Registered
from saekit.protocols import PretrainedLoader
from saekit.reasons import error_text
from saekit.saved import PretrainedSAE, SAEFiles

__all__ = ["read_with", "recognized"]


def recognized(items: Iterable[Registered], files: SAEFiles) -> tuple[list[Registered], list[str]]:
    """The loaders that say that ``files`` are of their format, and texts about those that failed to say.

    Where one recognizes the files, the failures are warnings.
    """
    found, failed = [], []
    for item in items:
        try:
            loader = built(item, None)
            with blamed(item, "detects"):
                if bool(loader.detects(files)):
                    found.append(item)
        except Exception as error:
            notes = getattr(error, "__notes__", ()) if not isinstance(error, PluginFailedError) else ()
            failed.append(" ".join([error_text(error), *notes]))
    if found:
        for text in failed:
            warnings.warn(text, PluginWarning, stacklevel=5)
    return found, failed


def read_with(choice: Choice[PretrainedLoader], files: SAEFiles) -> PretrainedSAE:
    """What the loader that was chosen reads from ``files``; its failures name it."""
    item, loader = choice.item, choice.build()
    with blamed(item, "load"):
        read = loader.load(files)
    if not isinstance(read, PretrainedSAE):
        raise returned(item, "load", read, "expected a saekit.PretrainedSAE")
    return read
