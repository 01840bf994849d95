"""The text that every Python installation carries: ``saekit/python-stdlib``.

The sources of the running interpreter's standard library, docstrings included, are about 11 MB of real
text that needs no download.  The embedded model was trained on them, and the demo reads them.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path

_NOT_PROSE = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_HELD_OUT_EVERY = 20


@cache
def _files(root: Path) -> tuple[tuple[str, Path], ...]:
    """The ``.py`` files in ``root`` without its tests, by name in the order in which they are read.

    They are looked for once: a run opens its text several times, and a standard library stays as it is.
    """
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_PROSE]  # site-packages may be large: do not go there
        home = Path(folder)
        place = "" if home == root else f"{home.relative_to(root).as_posix()}/"
        found += [(place + name, home / name) for name in names if name.endswith(".py")]
    return tuple(sorted(found, key=lambda file: blake2b(file[0].encode()).digest()))


def stdlib_documents(split: str = "train", root: Path | None = None) -> Iterator[dict[str, str]]:
    """One ``{"text", "path"}`` record per file of ``split``: ``train``, ``heldout`` (one file in 20) or ``all``.

    The split follows a hash of the path, so a file stays on its side whatever else is installed.  The order follows one
    too, since files of one folder are much alike.  Files are read as they are needed.
    """
    for name, path in _files(root or Path(sysconfig.get_path("stdlib"))):
        if split != "all" and (split == "heldout") != _is_held_out(name):
            continue
        try:
            with tokenize.open(path) as file:  # honors a PEP 263 encoding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a deliberately broken or unreadable source is no text
        if text.strip():
            yield {"text": text, "path": name}


def _is_held_out(name: str) -> bool:
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big") % _HELD_OUT_EVERY == 0
