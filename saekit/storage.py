"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saekit.errors import StorageError

__all__ = ["locked", "new_folder", "remove_folder", "sha256", "tidy", "write_text"]


@contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder to write into, which becomes ``path`` when all went well.

    It replaces what was there, or with ``replace`` off leaves that alone and raises.

    Everything is synced before the rename, so a crash never leaves a mixture: it leaves the new folder or the old one,
    which for the instant between two renames has a hidden name beside it, from which :func:`tidy` brings it back.
    """
    temporary = _hidden(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for item in temporary.rglob("*"):
            _sync(item)
        _sync(temporary)
        if path.exists() and not replace:
            raise FileExistsError(errno.EEXIST, "it has come to be there meanwhile", str(path))
        _put(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}. What was there before is kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, where there may be another folder, which goes."""
    if not path.exists():
        temporary.rename(path)
        return
    old = _hidden(path, "old")
    try:
        path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name; :class:`StorageError` if that fails."""
    hidden = _hidden(path, "tmp")
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error


def tidy(folder: Path) -> None:
    """Remove what a process that was killed has half written in ``folder``, and bring back what it has half replaced.

    Nobody may be writing there.
    """
    try:
        for left in list(folder.glob(".*")):
            match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)", left.name)
            if match is None:
                continue
            if match[2] == "old" and not (folder / match[1]).exists():
                left.rename(folder / match[1])
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
    except OSError as error:
        raise StorageError(f"cannot tidy {folder} up after a run that was killed: {error.strerror or error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from entering this for ``folder``; :class:`BlockingIOError` when one is in it.

    The lock goes with the process, however it ends.  Where the system has no such locks, there is none.
    """
    try:
        import fcntl  # POSIX has it

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # not on this file system
            pass
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all or nothing."""
    temporary = _hidden(path, "tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
