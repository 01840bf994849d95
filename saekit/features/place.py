"""The folder of a feature store: what is in it, what of that is a store's, and how a new store comes into it.

Only files that a store writes are ever removed, by their names, and only where the folder is known to be a store's: by
the seal of its manifest or of a pass that has begun; of one that is damaged, by there being nothing else in it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from saekit.errors import DataError, PlaceError
from saekit.features.manifest import ANEW, MANIFEST, StoreManifest, differences, is_sealed, is_store
from saekit.files.storage import read_json
from saekit.files.writers import one_writer

__all__ = [
    "COLLECTING",
    "PROGRESS",
    "another",
    "check_place",
    "is_part",
    "opened_for",
    "put_files",
    "sealed_table",
    "storing",
]

COLLECTING, PROGRESS, WHOLE = "collecting", "progress.json", "whole"
_FILES = (MANIFEST, "contexts.safetensors", "vocabulary.json")
_TABLES = ("index", "activations", "kept", "together", "weights", "statistics", "logits")
_SAE_FILES = tuple(f"{name}.safetensors" for name in _TABLES)
_SAE, _PART = re.compile(r"sae-[0-9]+"), re.compile(r"part-[0-9]{5,}")


def is_part(name: str) -> bool:
    """Whether a folder in ``collecting`` is called as a pass calls what it writes."""
    return name == WHOLE or _PART.fullmatch(name) is not None


def sealed_table(path: Path) -> Mapping[str, Any] | None:
    """What a file of ours says, which nobody has changed since; None: it is something else, or damaged."""
    try:
        table = read_json(path)
    except (OSError, ValueError):
        return None
    return table if is_sealed(table) else None


def check_place(store: Path, *, overwrite: bool = False) -> None:
    """:class:`PlaceError` for a folder that holds something else than a store or the beginning of one."""
    if store.exists() and not store.is_dir():
        raise PlaceError(f"{str(store)!r} is a file: a feature store is a folder; name another one (folder)")
    names = _found(store) if store.is_dir() else []
    if not names or _is_ours(store) or (is_store(store) and not overwrite):  # then loading it says what is wrong
        return
    others = [*_others(store)] or names
    raise PlaceError(
        f"{str(store)!r} holds something else ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): a "
        "feature store needs a folder of its own; name a new one (folder)"
    )


def _is_ours(store: Path) -> bool:
    if (is_store(store) and sealed_table(store / MANIFEST)) or sealed_table(store / COLLECTING / PROGRESS):
        return True
    if any(_others(store)):
        return False
    parts = store / COLLECTING
    begun = (parts / PROGRESS).is_file() and any(_PART.fullmatch(name) for name in _visible(parts))
    return begun or all((store / name).is_file() for name in (*_FILES[1:], f"sae-0/{_SAE_FILES[0]}"))


def _others(store: Path) -> Iterator[str]:
    """What is in a folder, and is called as nothing that a store has."""
    for name in _visible(store):
        path = store / name
        folder = path.is_dir() and not path.is_symlink()
        if folder and _SAE.fullmatch(name):
            yield from (f"{name}/{one}" for one in _visible(path) if one not in _SAE_FILES)
        elif folder and name == COLLECTING:
            yield from (f"{name}/{one}" for one in _visible(path) if one != PROGRESS and not is_part(one))
        elif folder or name not in _FILES:
            yield name


def _found(store: Path) -> list[str]:
    """What is in a folder, without the empty folders that one who was ended at once, or could not go on, has left."""
    ours = [
        name for name in _visible(store) if (name == COLLECTING or _SAE.fullmatch(name)) and (store / name).is_dir()
    ]
    empty = {name for name in ours if not _visible(store / name)}
    return [name for name in _visible(store) if name not in empty]


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def opened_for(store: Path, wanted: StoreManifest) -> StoreManifest | None:
    """What the store that is there says, if it is finished and the very one that is ``wanted``.

    None where there is none; :class:`DataError` names what another has.
    """
    if not (store / MANIFEST).exists():
        if _found(store) and not (store / COLLECTING / PROGRESS).exists():
            raise DataError(f"the feature store {str(store)!r} is damaged: {MANIFEST} is missing. {ANEW}")
        return None
    found = StoreManifest.load(store)
    if lines := [*differences(found.identity, wanted.identity)]:
        raise DataError(another(store, lines))
    return found


def another(store: Path, lines: Sequence[str], *, begun: bool = False) -> str:
    """That ``store`` holds something else than is wanted, or what has ``begun`` to be that, and what can be done."""
    listed = "\n".join(f"  - {line}" for line in lines[:12])
    place, beside = str(store), str(store.with_name(f"{store.name}-2"))
    what = "the beginning of another feature store" if begun else "another feature store"
    shown = "" if begun else f"To look at it, name that folder (saekit dashboard {shlex.quote(place)}). "
    return (
        f"{place!r} holds {what}, which was collected before, for a dashboard or by itself:\n{listed}\n{shown}To keep "
        f"it, collect into another folder: folder={beside!r}, --folder {shlex.quote(beside)}. To replace it: "
        f"{ANEW[0].lower()}{ANEW[1:]}"
    )


def put_files(store: Path, new: Path) -> None:
    """Move the files below ``new`` to their places in ``store``, where those of an older store go.

    There is no manifest then.  Raises :class:`OSError`.
    """
    _remove_files(store)
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        target = store / path.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)  # noqa: PTH105 - over a file that is there, on Windows, too


def _remove_files(store: Path) -> None:
    """Remove the files of a store, the manifest first.  Of links the links go, and what they lead to stays."""
    for name in _FILES:
        (store / name).unlink(missing_ok=True)
    for folder in [path for path in store.iterdir() if _SAE.fullmatch(path.name)]:
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            for name in _SAE_FILES:
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # where somebody has put something else into it
                folder.rmdir()


def storing(store: Path) -> AbstractContextManager[None]:
    """For one writer at a time; what the disk refuses is told with how to go on."""
    then = "What was collected so far is kept; when there is room, the same call goes on after it"
    return one_writer(store, "feature store", "collecting features into", then)
