"""Paths as users write them: ``~`` stands for the home folder wherever saekit takes a path."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["as_path", "expanded", "here", "leads_out", "steady"]


def expanded(path: str | os.PathLike[str]) -> str:
    """``path`` as a text, with ``~`` and ``~user`` at its beginning replaced by that home folder."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def as_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` expanded.  Every call that takes a path from the outside begins with this."""
    return Path(expanded(path))


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
