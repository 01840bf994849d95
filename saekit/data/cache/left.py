"""What a writer that was killed has left in a cache's folder, told from everything else, which is never removed."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from saekit.data.cache.manifest import MANIFEST, Manifest
from saekit.errors import DataError
from saekit.files.names import half_written

__all__ = ["LOCK", "check_target", "remove_left"]

LOCK = ".lock"
_SHARD = re.compile(r"shard-(\d{5,})")
_BEGINS = b'{"format"'


def check_target(folder: Path) -> None:
    """What a writer goes on with must be a cache.

    A folder without a manifest must be empty, but for what a writer that was killed at once has left.
    """
    if (folder / MANIFEST).exists():
        Manifest.load(folder)
        return
    if not folder.is_dir():
        return
    if names := sorted(path.name for path in folder.iterdir() if not _is_left_at_first(path)):
        raise DataError(
            f"the folder {str(folder)!r} is no activation cache and holds {', '.join(names[:5])}; choose "
            "another (activations.cache.folder)"
        )


def _is_left_at_first(path: Path) -> bool:
    """Whether ``path`` can be there before a manifest is: an empty lock, or a manifest half written."""
    if path.name == LOCK:
        return _is_file(path) and not path.stat().st_size
    return _is_torn_manifest(path)


def remove_left(folder: Path, manifest: Manifest) -> None:
    """Remove from ``folder`` what writing ``manifest`` and a shard more can have left half done.

    By its name and by what is in it: a file or folder with such a name and other contents stays.  :class:`DataError`
    for one that stands where a shard belongs.
    """
    ours = {rows.file for rows in manifest.sites} | set(manifest.origins)
    following = len(manifest.shards)
    torn = []
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        unnamed = match is not None and int(match[1]) >= following
        name, _ = half_written(path.name) or ("", "")
        if (path.name == manifest.shard_folder(following) or _SHARD.fullmatch(name)) and _holds(path, ours):
            torn.append(path)
        elif unnamed:
            raise DataError(
                f"{path} is in the way: {MANIFEST} names {following} shards, and writing has not left this one. "
                f"Restore the {MANIFEST} that names it, or move it away"
            )
        elif _is_torn_manifest(path):
            torn.append(path)
    for path in torn:
        if _is_file(path):
            path.unlink()
            continue
        for file in path.iterdir():
            if file.name in ours:
                file.unlink()
        path.rmdir()  # which fails if something else has come to be there


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_torn_manifest(path: Path) -> bool:
    """Whether it begins as a manifest does, as far as it goes; what was not synced may be zeros."""
    if half_written(path.name) != (MANIFEST, "tmp") or not _is_file(path):
        return False
    with path.open("rb") as file:
        start = file.read(64)
    start = b"".join(start.replace(b"\0", b"").split())[: len(_BEGINS)]
    return _BEGINS.startswith(start)


def _holds(path: Path, names: set[str]) -> bool:
    """Whether it is a folder with files of these ``names`` alone."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        return False
    return all(item.name in names and _is_file(item) for item in path.iterdir())
