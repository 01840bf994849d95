"""What is different on Windows, as far as it can be played here."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import disk, runs
from support.saved import make, other, thesis

import saekit
from saekit import SAE
from saekit.errors import ConfigError, StorageError
from saekit.files import names, storage
from saekit.files.names import fault_of_name, made_name
from saekit.runs.folder import run_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders cannot be opened, only what is open for writing can be synced, and there is no fcntl."""
    monkeypatch.setattr(names, "on_windows", lambda: True)
    monkeypatch.setattr(storage, "on_windows", lambda: True)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    opened, sync = os.open, os.fsync
    handles: dict[int, int] = {}

    def open_file(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = opened(path, flags, *rest, **options)
        handles[handle] = flags
        return handle

    def fsync(handle: int) -> None:
        if handles.get(handle, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY) == 0:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("windows")
def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    runs.stopped(runs.fake_config(tmp_path, checkpoints={"name": "run", "n_checkpoints": 4}), 5)
    result = runs.resume(tmp_path / "run")
    assert result.metrics["details/n_training_tokens"] == 2700
    assert SAE.load(result.folder / "sae", plugins=runs.manager()).d_sae == 64


@pytest.mark.usefixtures("windows")
def test_an_sae_is_saved(tmp_path: Path) -> None:
    make().save(tmp_path / "sae")
    other().save(tmp_path / "sae")
    make().save(thesis(tmp_path / "work"))
    assert SAE.load(tmp_path / "sae").d_in == 7
    assert SAE.load(tmp_path / "work").d_in == 12


@pytest.mark.usefixtures("windows")
def test_what_is_open_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, moves = [3], (Path.rename, Path.replace)

    def busy(number: int) -> Any:
        def move(path: Path, to: Path) -> Path:
            left[0] -= 1
            if left[0] > 0:
                raise PermissionError(errno.EACCES, "Permission denied")
            return moves[number](path, to)

        return move

    monkeypatch.setattr(Path, "rename", busy(0))
    monkeypatch.setattr(Path, "replace", busy(1))
    storage.write_text(tmp_path / "a", "x\ny\n")
    assert (tmp_path / "a").read_bytes() == b"x\ny\n", "lines end as everywhere"
    left[0] = 3
    with storage.new_folder(tmp_path / "folder") as folder:
        (folder / "b").write_text("")
    assert (tmp_path / "folder/b").exists()
    left[0] = 10**9
    monkeypatch.setattr(storage, "_PATIENCE", 0.1)
    with pytest.raises(StorageError, match="cannot write .*a: Permission denied"):
        storage.write_text(tmp_path / "a", "z")
    assert (tmp_path / "a").read_bytes() == b"x\ny\n"


def test_elsewhere_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def busy(path: Path, to: Path) -> Path:
        calls.append(to)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(StorageError):
        storage.write_text(tmp_path / "a", "z")
    assert len(calls) == 1


@pytest.mark.usefixtures("windows")
def test_a_folder_is_locked_by_a_file_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[tuple[int, int]] = set()

    def locking(handle: int, mode: int, size: int) -> None:
        assert (mode, size) == (2, 1)
        key = (os.fstat(handle).st_dev, os.fstat(handle).st_ino)
        if key in held:
            raise OSError(errno.EACCES, "Permission denied")
        held.add(key)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with storage.locked(tmp_path), pytest.raises(BlockingIOError), storage.locked(tmp_path):
        raise AssertionError("two are in it")
    (tmp_path / "other").mkdir()
    with storage.locked(tmp_path / "other"):
        pass


@pytest.mark.usefixtures("windows")
def test_without_any_locks_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with storage.locked(tmp_path), storage.locked(tmp_path):
        pass
    with storage.locked(tmp_path / "nowhere"):
        pass


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a:b", "holds ':', which Windows does not take"), ("a<b", "holds '<'"), ('a"b', "holds '\"'"),
        ("what?", "holds '\\?'"), ("a.", "ends in a dot or a space"), ("a ", "ends in a dot or a space"),
        ("con", "is the name of a device of Windows"), ("NUL.txt", "is the name of a device"),
        ("lpt1", "is the name of a device"),
    ],
)  # fmt: skip
def test_names_that_windows_does_not_take(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoints.name: must be the name of a new folder .*{told}"):
        saekit.train(runs.fake_config(tmp_path, checkpoints={"name": name}), plugins=runs.manager())


@pytest.mark.parametrize("name", ["a:b", "a<b", "what?", "con", "a."])
def test_elsewhere_they_are_names(name: str) -> None:
    assert fault_of_name(name) is None


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("text", ["2026-01-01-model:layer?1", "a" * 400 + ".", "x. ", "a/b\\c", "<>", "\ud800", ""])
def test_made_names_are_names_everywhere(text: str) -> None:
    assert fault_of_name(made_name(text, room=8) + "-1") is None


@pytest.mark.usefixtures("windows")
def test_the_folder_of_a_site_with_signs(tmp_path: Path) -> None:
    table = {"checkpoints": {"folder": str(tmp_path)}, "site": {"hook_name": "model:layers|0?"}}
    assert run_folder(saekit.load_config(table), None).name.endswith("-model-layers-0--1")


def test_a_file_system_that_does_not_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of networks: files are synced, and of folders what can be."""
    sync, refused = os.fsync, []

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112 - of a handle
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_text(tmp_path / "a", "x")
    assert refused

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        storage.write_text(tmp_path / "a", "y")


def test_files_and_folders_of_this_system_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system itself, for which other tests do not wait."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: (disk.wait_for(handle), synced.append(os.fstat(handle).st_ino)))
    storage.write_text(tmp_path / "a", "x")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write .*a: it holds text that is not valid Unicode"):
        storage.write_text(tmp_path / "a", "\ud800")
    assert not list(tmp_path.iterdir())
