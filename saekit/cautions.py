"""Warnings at the line of whoever called saekit, which is where something can be done.

Plugins warn by :func:`warn`, too.  Importing this imports no torch.
"""

from __future__ import annotations

import sys
import sysconfig
import warnings
from types import FrameType

__all__ = ["stands_between", "warn"]

_packages = {__name__.partition(".")[0]}
"""Those whose lines are none of a user's, wherever they are."""
_LIBRARIES = ("site-packages", "dist-packages")
_PYTHON = sysconfig.get_path("stdlib")
"""Asked once: each answer is put together anew, and a warning asks for every function that it passes."""


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """As :func:`warnings.warn`, at the line that called saekit, whatever stands between it and here.

    That is the caller of the outermost function of saekit, or the nearest caller of it that is no library: a model of
    another library may be what the user has called.  In a thread of saekit's own there is none, and the line is that
    of who calls this.
    """
    warnings.warn(text, category, stacklevel=_level())


def stands_between(module: str) -> None:
    """Say that the package of ``module`` is a plugin's, which saekit calls."""
    _packages.add(module.partition(".")[0])


def _level() -> int:
    """That of the user's line, for a warning of who calls this."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith("<frozen importlib"):  # which warnings does not count either
            frames.append(frame)
        frame = frame.f_back
    ours = max(place for place, one in enumerate(frames) if _is_ours(one))
    users = [place for place, one in enumerate(frames) if place > ours and not _is_library(one)]
    return 1 + (users[0] if users else 1)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _packages


def _is_library(frame: FrameType) -> bool:
    """Whether its code is of Python itself or was installed; what a notebook or a prompt runs has no such file."""
    path = frame.f_code.co_filename
    return path.startswith(_PYTHON) or any(name in path for name in _LIBRARIES)
