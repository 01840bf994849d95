"""Paths as users write them: ``~`` stands for the home folder wherever saekit takes a path."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["as_path", "expanded"]


def expanded(path: str | os.PathLike[str]) -> str:
    """``path`` as a text, with ``~`` and ``~user`` at its beginning replaced by that home folder."""
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def as_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` expanded.  Every call that takes a path from the outside begins with this."""
    return Path(expanded(path))
