"""Whose format files are of: loaders are asked, and what fails in one says whose it is, and stops no other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import attrs

from saekit.abilities import KnowsParts
from saekit.cautions import warn
from saekit.errors import PluginFailedError, PluginWarning, SAEFormatError
from saekit.kinds import PRETRAINED_LOADERS
from saekit.plugins.building import blamed, built, returned
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager
from saekit.plugins.registry import Registered
from saekit.protocols import PretrainedLoader
from saekit.reasons import error_text
from saekit.saved import PretrainedSAE, SAEFiles

__all__ = ["Score", "UnrecognizedError", "detected", "read_with", "recognized", "usable"]


Score: TypeAlias = tuple[float, Registered]
"""How sure a loader is, above 0 and up to 1."""
_LIKELY = 0.5, 0.75
"""From where to where a loader finds it likely that files are of its format, and is not sure."""


class UnrecognizedError(SAEFormatError):
    """No loader recognizes some files.  ``hint`` says what they look like all the same; empty: nothing."""

    def __init__(self, text: str, hint: str) -> None:
        super().__init__(text)
        self.hint = hint


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


def detected(files: SAEFiles, plugins: PluginManager) -> Registered:
    """The loader that is surest that ``files`` are of its format.

    A warning says that another one may be right.  :class:`SAEFormatError` for several that are equally sure, and
    :class:`UnrecognizedError` where there is none.
    """
    items = [item for item in plugins.registry(PRETRAINED_LOADERS).items if usable(item)]
    found, failed = recognized(items, files)
    surest = [item for score, item in found if score == found[0][0]]
    if len(surest) == 1:
        _warn_of_others(found, files)
        return surest[0]
    names = ", ".join(item.key for item in surest or items)
    if found:
        others = ", ".join(f"{item.key} ({score:.2g})" for score, item in found[len(surest) :])
        raise SAEFormatError(
            f"several loaders recognize {files.place}: {names}. They are equally sure ({found[0][0]:.2g} of 1"
            + (f"; less sure: {others}). " if others else "). ")
            + "Name one: loader=..."
        )
    if pointers := files.pointers():
        hint = (
            f"pointers of git-LFS are there in the place of {', '.join(pointers)}: `git lfs pull` in that "
            "repository fetches the files"
        )
        raise UnrecognizedError(f"no loader recognizes {files.place}: {hint}", hint)
    shown = ", ".join(sorted(files.names)[:10]) or "no files"
    nearly, failures = _nearly_recognized(items, files)
    hint = "; or ".join(nearly)
    what = hint or f"there are {names}; name one: loader=..."
    raise UnrecognizedError(
        f"no loader recognizes {files.place}, which has {shown}. {what[0].upper()}{what[1:]}"
        + "".join(f"\n{text}" for text in (*failed, *failures)),
        hint,
    )


def _warn_of_others(found: Sequence[Score], files: SAEFiles) -> None:
    """Where the surest loader is not sure, and another one thinks it likely, too, that may be the right one."""
    best = found[0][0]
    likely = [found[0], *(one for one in found[1:] if best <= _LIKELY[1] and one[0] >= _LIKELY[0])]
    if len(likely) == 1:
        return
    names = [item.entry.name for _, item in likely]
    own, *rest = names if len({*names}) == len(names) else [item.key for _, item in likely]
    what = [f"{name} [{item.entry.summary}]" for name, (_, item) in zip((own, *rest), likely, strict=True)]
    scores = ", ".join(f"{name} {score:.2g}" for name, (score, _) in zip((own, *rest), likely, strict=True))
    all_of = "both" if len(likely) == 2 else f"all {len(likely)}"
    warn(
        f"{files.place} is read by {what[0]}, and may be for {' or '.join(what[1:])}: {all_of} find it likely, and "
        f"none is sure ({scores}; 1 is sure). "
        f"{' or '.join(f'loader={name!r}' for name in rest)} reads it as that one does, and loader={own!r} says that "
        "this is right"
    )


def _nearly_recognized(items: Iterable[Registered], files: SAEFiles) -> tuple[list[str], list[str]]:
    """What the files look like, and what is missing of it, as sentences, and texts about loaders that failed."""
    nearly, failed = [], []
    for item in items:
        try:
            loader = built(item, None)
        except Exception:  # which is said already
            continue
        if not isinstance(loader, KnowsParts):
            continue
        try:
            with blamed(item, "missing_part"):
                said = loader.missing_part(files.unopened())
            if not isinstance(said, str | None):
                raise returned(item, "missing_part", said, "expected a text, or None")
            if said:
                nearly.append(f"it looks like a folder of {item.key} [{item.entry.summary}] that lacks {said}")
        except Exception as error:
            failed.append(error_text(error))
    return nearly, failed


def read_with(choice: Choice[PretrainedLoader], files: SAEFiles) -> PretrainedSAE:
    """What the loader that was chosen reads from ``files``; its failures name it."""
    item, loader = choice.item, choice.build()
    with blamed(item, "load"):
        read = loader.load(files)
    if not isinstance(read, PretrainedSAE):
        raise returned(item, "load", read, "expected a saekit.PretrainedSAE")
    return read
