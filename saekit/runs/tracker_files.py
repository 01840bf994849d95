"""Files that trackers keep in a run folder: nobody else's, and nothing that leads out of it."""

from __future__ import annotations

from pathlib import Path

from saekit.errors import ConfigError
from saekit.files.names import fault_of_name, is_free_in_run
from saekit.files.storage import tidy

__all__ = ["TrackerFiles"]


class TrackerFiles:
    """Those in one run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()

    def path(self, name: str) -> Path:
        """Of a file or folder of one tracker's own, half-written ones of which are removed.

        :class:`ConfigError` when it is the run's own or another tracker's, or ``name`` is not the name of one file.
        """
        key = name.casefold()  # some file systems know no other
        fault = fault_of_name(name)
        if fault is None and not is_free_in_run(name):
            fault = "is a file of the run itself"
        if fault is None and key in self._taken:
            fault = "is another tracker's"
        if fault is None:
            tidy(self._folder, name.__eq__)
            fault = _fault_of_place(self._folder / name)
        if fault is not None:
            raise ConfigError([("trackers", f"the file {name!r} in the run folder {fault}; choose another name")])
        self._taken.add(key)
        return self._folder / name


def _fault_of_place(path: Path) -> str | None:
    """Why what lies there is nothing that a tracker may write into."""
    if path.is_symlink():
        return "is a symbolic link"
    return None if path.is_file() or path.is_dir() or not path.exists() else "is a pipe or a device"
