"""The text that every Python installation carries: ``saekit/python-stdlib``.

The sources of the running interpreter's standard library, docstrings included, are about 11 MB of real
text that needs no download.  The embedded model was trained on them, and the demo reads them.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

_NOT_PROSE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HELD_OUT_EVERY = 20


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The standard library's ``.py`` files without its tests, sorted by path, so that the order is one order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_PROSE]  # site-packages may be large: do not go there
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def stdlib_documents(split: str = "train", root: Path | None = None) -> Iterator[dict[str, str]]:
    """One ``{"text", "path"}`` record per file of ``split``: ``train``, ``heldout`` (one file in 20) or ``all``.

    The split follows a hash of the path, so a file stays on its side whatever else is installed.  The order follows one
    too, since files of one folder are much alike.  Files are read as they are needed.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    named = {path.relative_to(root).as_posix(): path for path in stdlib_files(root)}
    for name in sorted(named, key=lambda name: blake2b(name.encode()).digest()):
        if split != "all" and (split == "heldout") != _is_held_out(name):
            continue
        try:
            with tokenize.open(named[name]) as file:  # honors a PEP 263 encoding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a deliberately broken or unreadable source is no text
        if text.strip():
            yield {"text": text, "path": name}


def _is_held_out(name: str) -> bool:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") % _HELD_OUT_EVERY == 0
