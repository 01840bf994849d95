"""Paths as users write them: ``~`` stands for the home folder wherever saekit takes a path."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from saekit.errors import PlaceError

__all__ = ["as_path", "expanded", "folder_of", "here", "leads_out", "steady"]


def expanded(path: str | os.PathLike[str]) -> str:
    """``path`` as a text, with ``~`` and ``~user`` at its beginning replaced by that home folder."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def as_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` expanded.  Every call that takes a path from the outside begins with this.

    :class:`PlaceError` for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise PlaceError(f"a path is needed here, a text or a pathlib.Path; found {_named(path)}")
    return Path(expanded(path))


def _named(what: object) -> str:
    return f"{what!r}" if what is None or isinstance(what, (int, float, bytes)) else f"a {type(what).__name__}"


def folder_of(what: Any) -> Path:
    """The folder of what a run, a sweep or a feature store is, or the one that a path names.

    :class:`PlaceError` for what is neither.
    """
    return as_path(getattr(what, "folder", what))


def here() -> Path | None:
    """The working directory, unless somebody has removed it."""
    try:
        return Path.cwd()
    except OSError:
        return None


def steady(path: Path, given_in: Path | None) -> Path:
    """``path``, which was given when ``given_in`` was the working directory, as a path to the same place now.

    It stays as people wrote it for as long as that means the same.
    """
    return path if given_in is None or path.is_absolute() or here() == given_in else given_in / path


def leads_out(path: str) -> bool:
    """Whether ``path``, which somebody else wrote, would leave a folder that it is joined to, on any system."""
    either = path.replace("\\", "/")
    return either.startswith("/") or ".." in either.split("/") or re.match(r"[A-Za-z]:(/|$)", either) is not None
