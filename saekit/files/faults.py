"""Why a stranger's file cannot be read, as its bytes and its size tell: a pointer of git-LFS, empty or cut off."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

__all__ = ["cut_off", "pointer_size"]

_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024  # bytes, by the specification of git-LFS
_ZIP = b"PK\x03\x04"
_CUT = "it is cut off: {}. Fetch or copy it again"
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def pointer_size(path: Path) -> int | None:
    """The bytes of the file that git-LFS has, where ``path`` is a pointer in its place; None: it is none.

    0 where the pointer does not say.
    """
    if path.stat().st_size > _LONGEST_POINTER:
        return None
    text = path.read_bytes()
    if not text.startswith(_POINTER):
        return None
    said = re.search(rb"^size (\d{1,15})$", text, re.MULTILINE)
    return 0 if said is None else int(said[1])


def cut_off(path: Path) -> str | None:
    """How a file of safetensors, or an archive as ``.pt`` and ``.npz`` are, is cut off, as "it ..."; None: it is not.

    Asked of files that could not be read.
    """
    size = path.stat().st_size
    if not size:
        return "it is empty"
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(1)
        if start.startswith(_ZIP):
            return None if zipfile.is_zipfile(path) else _CUT.format(f"{size:,} bytes are there, and not its end")
        length = int.from_bytes(start, "little")
        if path.suffix != ".safetensors" or header != b"{" or length > _LONGEST_HEADER:
            return None
        header += file.read(length - 1)
    if len(header) < length:
        return _CUT.format(f"{size:,} of at least {8 + length:,} bytes are there")
    whole = _whole_size(header)
    return None if whole is None or whole <= size else _CUT.format(f"{size:,} of {whole:,} bytes are there")


def _whole_size(header: bytes) -> int | None:
    """The bytes of a file of safetensors with this header; None: it is none."""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return 8 + len(header) + int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
