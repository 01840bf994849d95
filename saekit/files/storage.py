"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saekit.errors import StorageError
from saekit.files.names import half_written, hidden_name, on_windows

__all__ = [
    "add_files",
    "check_file",
    "is_locked",
    "leads_out",
    "locked",
    "new_files",
    "new_folder",
    "nothing",
    "parse_json",
    "read_json",
    "remove_folder",
    "replace_files",
    "sha256",
    "sync_files",
    "tidy",
    "why_no_folder_in",
    "write_bytes",
    "write_text",
]

_PATIENCE = 2.0  # seconds; on Windows a virus scanner may hold what was just written
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)


def nothing() -> None:
    """For what is called from time to time and may end a piece of work by raising: this lets it go on."""


@contextmanager
def new_folder(path: Path, *, replace: bool = True, go_on: Callable[[], None] = nothing) -> Iterator[Path]:
    """A temporary folder to write into, which becomes ``path`` when all went well.

    It replaces what was there, or with ``replace`` off leaves that alone and raises.  ``go_on`` is called before each
    file is synced, and before the rename; what it raises ends this.

    Everything is synced before the rename, so a crash never leaves a mixture: it leaves the new folder or the old one,
    which for the instant between two renames has a hidden name beside it, from which :func:`tidy` brings it back.
    """
    temporary = _hidden(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for item in temporary.rglob("*"):
            if not item.is_symlink():
                go_on()
                _sync(item)
        _sync(temporary)
        go_on()
        if not replace:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "it has come to be there meanwhile", str(path))
            _rename(temporary, path)  # which fails if there is something by now
        else:
            _put(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}. What was there before is kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, on the same disk, from which :func:`replace_files` may take new files."""
    temporary = _hidden(path, "tmp")
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, where there may be another folder, which goes."""
    if not path.exists():
        _rename(temporary, path)
        return
    old = _hidden(path, "old")
    try:
        _rename(path, old)
        _rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name; :class:`StorageError` if that fails."""
    hidden = _hidden(path, "tmp")
    try:
        _rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error


def replace_files(folder: Path, files: Mapping[str, Path | None], last: str) -> None:
    """Move new files into ``folder`` by name, where those that are there go; None: it just goes.

    A folder without its file ``last`` is nothing that is read: that one goes first and comes last, so that whatever
    ends this before its end leaves no mixture.  The new files must lie on the same disk.  Raises :class:`OSError`.
    """
    for path in files.values():
        if path is not None:
            _sync(path)
    (folder / last).unlink(missing_ok=True)
    _sync(folder)
    for name in sorted(files, key=lambda name: name == last):
        if name == last:
            _sync(folder)
        if (new := files[name]) is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _replace(new, folder / name)
    _sync(folder)


def add_files(folder: Path, new: Path) -> None:
    """Move the files below ``new`` to the same places below ``folder``, all or none.

    One that is there already stays, if it is the very same; :class:`FileExistsError` for one that is another, before
    anything is moved.  Both lie on the same disk.  Raises :class:`OSError`.
    """
    found = {path.relative_to(new): path for path in sorted(new.rglob("*")) if path.is_file()}
    there = {name for name in found if os.path.lexists(folder / name)}
    for name in there:
        if not (folder / name).is_file() or sha256(folder / name) != sha256(found[name]):
            raise FileExistsError(errno.EEXIST, "there is another file of that name", str(folder / name))
    moved: list[Path] = []
    try:
        for name in found.keys() - there:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _sync(found[name])
            _rename(found[name], folder / name)
            moved.append(folder / name)
            _sync((folder / name).parent)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def tidy(folder: Path, mine: Callable[[str], bool]) -> None:
    """Remove what a process that was killed has half written in ``folder``, and bring back what it has half replaced.

    Of files and folders that ``mine`` says yes to, by the name that they were to have.  Nobody may be writing there.
    """
    try:
        for left in list(folder.glob(".*")):
            whole, kind = half_written(left.name) or ("", "")
            if not whole or not mine(whole):
                continue
            if left.is_symlink():  # saekit leaves none: what it leads to is somebody else's
                left.unlink()
            elif kind == "old" and not os.path.lexists(folder / whole):
                left.rename(folder / whole)
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
    except OSError as error:
        raise StorageError(f"cannot tidy {folder} up after a run that was killed: {error.strerror or error}") from error


def why_no_folder_in(place: Path) -> str | None:
    """Why no folder can be made in ``place``, in the system's words; None: it can.

    It is tried, with a hidden name: of some file systems, permissions do not say it.
    """
    if not place.is_dir():
        return os.strerror(errno.ENOTDIR)
    trial = _hidden(place / "trial", "tmp")
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return None


def leads_out(path: Path, folder: Path) -> bool:
    """Whether ``path``, below ``folder``, is in truth somewhere else, by a symbolic link on the way."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from entering this for ``folder``; :class:`BlockingIOError` when one is in it.

    The lock goes with the process, however it ends.  Where the system has no such locks, there is none.
    """
    try:
        import fcntl  # POSIX has it
    except ImportError:
        with _locked_on_windows(folder):
            yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError):
        yield
        return
    try:
        try:
            _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # not on this file system
            pass
        yield
    finally:
        os.close(handle)


def _flock(handle: int, how: int) -> None:
    """Take a lock, or raise :class:`BlockingIOError`; whoever only looks (:func:`is_locked`) is waited for."""
    import fcntl

    for left in (2, 1, 0):
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.02)
        else:
            return


def is_locked(folder: Path) -> bool | None:
    """Whether a process is in :func:`locked` for ``folder``; None where that cannot be seen.

    Processes on other machines are not seen on every shared disk, so ``False`` speaks of this one.
    """
    try:
        import fcntl
    except ImportError:  # where the lock is on a file's first byte, and to look would be to lock
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


@contextmanager
def _locked_on_windows(folder: Path) -> Iterator[None]:
    """Folders cannot be opened there, so a file in it is locked."""
    try:
        import msvcrt

        locking: Any = msvcrt
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        try:
            locking.locking(handle, locking.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK, errno.EAGAIN):
                raise BlockingIOError(errno.EAGAIN, "another process is in it", str(folder)) from error
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, all or nothing."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise StorageError(f"cannot write {path}: it holds text that is not valid Unicode") from error
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, all or nothing."""
    try:
        temporary = _hidden(path, "tmp")
        temporary.write_bytes(data)
        _sync(temporary)
        _replace(temporary, path)
        _sync(path.parent)
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError, UnicodeEncodeError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) else "its name is not valid Unicode"
        raise StorageError(f"cannot write {path}: {reason or error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; :class:`ValueError` for one that is not valid or nested too deep, :class:`OSError`."""
    check_file(path)
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What JSON says, as :func:`json.loads` has it with ``object_pairs_hook``; one that is nested too deep is no error
    of the interpreter's, but a :class:`ValueError`."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_file(path: Path) -> None:
    """:class:`OSError` for what is no file: to read a pipe may wait for ever, and a device may have no end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until the disk has files that another process will move.  Raises :class:`OSError`."""
    for path in paths:
        _sync(path)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(hidden_name(path.name, suffix))


def _rename(path: Path, to: Path) -> None:
    _patiently(lambda: path.rename(to))


def _replace(path: Path, to: Path) -> None:
    _patiently(lambda: path.replace(to))


def _patiently(move: Callable[[], object]) -> None:
    """On Windows nothing moves that somebody has open, as scanners and indexers have for a moment."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            move()
        except PermissionError:
            if not on_windows() or time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder, as far as the system can say so of folders."""
    folder = path.is_dir()
    if folder and on_windows():  # which cannot open one, and needs not
        return
    try:
        handle = os.open(path, os.O_RDWR if on_windows() else os.O_RDONLY)  # where only what can be written is synced
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (folder and error.errno in _NO_SYNC_OF_FOLDERS):
            raise
