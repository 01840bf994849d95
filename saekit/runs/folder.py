"""The folder of a run: whether it may be made, making it, whether it is still there.  Nothing here imports torch."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Self

from saekit.config import TrainConfig
from saekit.errors import ConfigError, PlaceError, StorageError
from saekit.files.names import fault_of_name, made_name
from saekit.files.paths import here, steady
from saekit.runs.place import RECORD

__all__ = ["RunFolderLostError", "Standing", "check_run_folder", "rescue_folder", "run_folder"]


class RunFolderLostError(StorageError):
    """The run folder is not there any more."""


def check_run_folder(config: TrainConfig, name: str | None) -> None:
    """A run folder that has a ``name`` must be new, and in ``checkpoints.folder``; else :class:`ConfigError`."""
    where = config.checkpoints.folder
    if "\0" in where or not _is_unicode(where):
        raise ConfigError([("checkpoints.folder", f"is not valid Unicode, or holds a null character: {where!r}")])
    if name is not None and (fault := fault_of_name(name)):
        raise ConfigError(
            [("checkpoints.name", f"must be the name of a new folder in checkpoints.folder, but {name!r} {fault}. To "
              "keep runs elsewhere, set checkpoints.folder")]
        )  # fmt: skip
    folder = Path(where) / (name or "run")
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):  # whether it can be made is another question
        return
    except OSError as error:
        raise ConfigError([("checkpoints.folder", f"{where!r} cannot be used: {error.strerror}")]) from error
    if name is not None:
        raise ConfigError([("checkpoints.name", f"{_what_is_there(folder)}; choose another name, or remove it")])


def _what_is_there(folder: Path) -> str:
    """What is in the place of a new run folder, in words."""
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder} exists already, and is {'a link' if folder.is_symlink() else 'a file'}, not a folder"
    with contextlib.suppress(OSError):
        there = sorted(path.name for path in folder.iterdir())
        if not there:
            # To make it is how a run claims it: of two that found it empty, neither could tell whose it is.
            return (
                f"the folder {folder} exists already. It is empty, and a run makes its own, so that no other takes it"
            )
        if RECORD not in there:
            listed = ", ".join(there[:3]) + (" ..." if len(there) > 3 else "")
            return f"the folder {folder} exists already, and is no run's: it holds {listed}"
    return f"the run folder {folder} exists already"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def run_folder(config: TrainConfig, name: str | None, kind: str | None = None, given_in: Path | None = None) -> Path:
    """Make the run's folder, which must be new: ``name``, or the date, ``kind`` (None: the sites) and a number.

    ``given_in`` was the working directory when the configuration was given.
    """
    parent = steady(Path(config.checkpoints.folder), given_in)
    check_run_folder(config, name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name is not None:
            (parent / name).mkdir()
            return parent / name
        return _numbered(parent, made_name(f"{datetime.now():%Y-%m-%d}-{kind or config.sites.name}", room=8))
    except OSError as error:
        raise PlaceError(f"cannot make a run folder in {parent}: {error.strerror} (checkpoints.folder)") from error


def rescue_folder(run: Path) -> Path:
    """Make a new folder beside one that was lost."""
    run = Path(os.path.abspath(run))  # noqa: PTH100 - what is not there has no real path
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        return _numbered(run.parent, f"{made_name(run.name, room=16)}-rescued")
    except OSError as error:
        raise StorageError(f"cannot make a folder in {run.parent}: {error.strerror}") from error


def _numbered(parent: Path, stem: str) -> Path:
    for number in itertools.count(1):
        folder = parent / f"{stem}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


class Standing:
    """Sees whether the folders of a run are the ones that they were when this began.  A context manager."""

    def __init__(self, folders: Collection[Path]) -> None:
        """Of none, it sees that all is well."""
        self._folders = list(dict.fromkeys(folders))
        self._handles: dict[Path, int] = {}
        self._known: dict[Path, os.stat_result] = {}
        self._given_in = here()

    def __enter__(self) -> Self:
        for folder in self._folders:
            # One that is open keeps its identity, also where file systems make up such numbers as they go.
            with contextlib.suppress(OSError):  # folders cannot be opened on Windows
                self._handles[folder] = os.open(folder, os.O_RDONLY)
            self._known[folder] = folder.stat()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def check(self) -> None:
        """:class:`RunFolderLostError` when one of them was removed, renamed or replaced."""
        for folder in self._folders:
            handle = self._handles.get(folder)
            known = self._known[folder] if handle is None else os.fstat(handle)
            try:
                same = os.path.samestat(known, steady(folder, self._given_in).stat())
            except FileNotFoundError:
                same = False
            except OSError:  # a network drive that does not answer says nothing of the kind
                continue
            if not same:
                raise RunFolderLostError(
                    f"the folder {folder} was removed, renamed or replaced while the run was training in it"
                )
