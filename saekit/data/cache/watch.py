"""Files that are read by mapping, and must not change under a run.

Where a mapped file has shrunk, reading past its end ends the process with SIGBUS, which no error can be made of.  So
each file that a batch needs is looked at before the batch is read; only what shrinks in the instant between the two
still ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from saekit.errors import DataError
from saekit.files.storage import sha256

__all__ = ["WatchedFile", "check_files"]


@attrs.define(eq=False)
class WatchedFile:
    """A file, and what it was when it was opened."""

    path: Path
    place: str
    """Where it is, whatever becomes the working directory."""
    size: int
    mark: tuple[int, int, int]
    """What is another one when it was replaced or written to: the inode, and the time of the last change."""
    sum: str | None
    """Its sha256, where that is known."""

    @classmethod
    def of(cls, path: Path, entry: Mapping[str, Any] | None) -> WatchedFile:
        """The file as it is now; ``entry`` is what the manifest says of it."""
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path} of the activation cache cannot be read: {error.strerror}") from error
        known = None if entry is None else entry["sha256"]
        return cls(path, str(path.absolute()), found.st_size, _mark(found), known)

    def check(self) -> None:
        """Look closely; :class:`DataError` unless it holds what it held."""
        try:
            found = Path(self.place).stat()
            if found.st_size != self.size:
                raise self._changed(f"has {found.st_size:,} bytes, and had {self.size:,} when it was opened")
            if _mark(found) == self.mark:
                return
            if self.sum is None or sha256(Path(self.place)) != self.sum:  # once for each change
                raise self._changed("was replaced or written to, and has other contents than were opened")
        except FileNotFoundError as error:
            raise self._changed("was removed") from error
        except OSError as error:
            raise self._changed(f"cannot be read any more ({error.strerror})") from error
        self.mark = _mark(found)  # the same again: copied anew, or touched

    def _changed(self, how: str) -> DataError:
        return DataError(
            f"{self.path} of the activation cache {how}: a cache must not change while it is read. Restore the file "
            "(`saekit cache verify` tells whether all is well), then go on"
        )


def _mark(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns  # the last cannot be set back


def check_files(files: Sequence[WatchedFile]) -> None:
    """:class:`DataError` names the first of ``files`` that is not as it was.  Fast, for there may be thousands."""
    try:
        for file, found in zip(files, map(os.stat, [file.place for file in files]), strict=True):
            if found.st_size != file.size or _mark(found) != file.mark:
                file.check()
    except OSError:
        for file in files:
            file.check()
