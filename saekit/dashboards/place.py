"""Where a dashboard is written, and what may be replaced there.  Nothing here needs torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from saekit.errors import PlaceError
from saekit.files.storage import why_no_folder_in, write_text

__all__ = ["GENERATOR", "check_page", "is_dashboard", "page_in", "write_page"]

GENERATOR = "saekit dashboard"
"""By what a file is known to be one, in its ``<meta name="generator">``."""
_NAME = "dashboard.html"
_HEAD = 4096  # bytes in which that stands


def page_in(place: Path) -> Path:
    """The file that is meant by ``place``, which may be a folder."""
    return place / _NAME if place.is_dir() else place


def is_dashboard(path: Path) -> bool:
    """Whether a file is a dashboard that saekit wrote."""
    try:
        with path.open("rb") as file:
            return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(_HEAD)
    except OSError:
        return False


def check_page(path: Path, *, overwrite: bool) -> None:
    """:class:`PlaceError` where no dashboard can be written, or something else would be lost."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise PlaceError(f"a dashboard is one file NAME.html, or goes into a folder that is there; found {str(path)!r}")
    if os.path.lexists(path) and not path.is_file():
        raise PlaceError(f"{str(path)!r} is no file: name another place for the dashboard (out)")
    if path.is_file() and not overwrite and not is_dashboard(path):
        raise PlaceError(
            f"{str(path)!r} is there and is no dashboard, so it is left alone: name another file (out), or replace it "
            "with overwrite=True (--overwrite)"
        )
    home = next(folder for folder in [*path.absolute().parents] if os.path.lexists(folder))
    if why := why_no_folder_in(home):
        where = "into" if home == path.absolute().parent else "below"
        raise PlaceError(f"cannot write a dashboard {where} {str(home)!r}: {why}")


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
        raise PlaceError(f"cannot make the folder {str(path.parent)!r}: {reason}") from error
    write_text(path, text)
