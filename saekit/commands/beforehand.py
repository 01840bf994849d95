"""What can be seen to be wrong with SAEs, a text and a store that are asked for, from names and small files alone.

It imports no torch, and asks no network: a slip in a path costs no loading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.commands.saes import published
from saekit.config import DatasetConfig
from saekit.data.in_memory import is_name
from saekit.data.text import check_place
from saekit.errors import DataError
from saekit.features.manifest import MANIFEST, StoreManifest
from saekit.features.place import another
from saekit.files.names import SAE_CONFIG
from saekit.files.paths import as_path

__all__ = ["check_collecting", "check_named", "check_store"]

_STORE = "features"


def check_named(saes: object, dataset: object = None) -> None:
    """The error that reading the SAEs or the text would end with, where a path is not there."""
    for one in _paths(saes):
        published(str(one), ())
    named = isinstance(dataset, str) and is_name(dataset)
    given: Mapping[str, Any] = dataset if isinstance(dataset, Mapping) else {"path": dataset} if named else {}
    if isinstance(dataset, os.PathLike):
        given = {"path": dataset}
    if isinstance(path := given.get("path"), (str, os.PathLike)):
        check_place(DatasetConfig(path=os.fspath(path)), given.get("split", "train"))


def check_collecting(what: object, folder: str | Path | None, collecting: Mapping[str, Any]) -> None:
    """Both, of what a page is asked for and of the options of collecting, where no store is given itself."""
    if not isinstance(what, (str, Path)) or (as_path(what) / MANIFEST).is_file():
        return
    check_named(what, collecting.get("dataset"))
    if collecting.get("contexts") is None:
        check_store(what, folder, collecting)


def check_store(what: object, folder: str | Path | None, asked: Mapping[str, Any]) -> None:
    """:class:`DataError` where a finished store of the SAEs surely was made otherwise than is ``asked``.

    Only what its manifest says is looked at; whether it is of these SAEs and this text is seen when they are read.
    """
    place = _beside(what) if folder is None else as_path(folder)
    if place is None or not (place / MANIFEST).is_file():
        return
    if lines := [*_unlike(StoreManifest.load(place), asked)]:
        raise DataError(another(place, lines))


def _unlike(there: StoreManifest, asked: Mapping[str, Any]) -> Iterator[str]:
    number, size = asked.get("n_contexts"), asked.get("context_size")
    if isinstance(number, int) and number < there.contexts:  # of more, a text may have no more than there are
        yield f"n_contexts: there {there.contexts}, wanted {number}"
    if isinstance(size, int) and size != there.context_size:
        yield f"context_size: there {there.context_size}, wanted {size}"
    for name, value in there.options.items():
        if asked.get(name, value) not in (value, None):
            yield f"{name}: there {value}, wanted {asked[name]}"


def _paths(saes: object) -> Iterator[str | Path]:
    several = isinstance(saes, Sequence) and not isinstance(saes, str)
    listed = saes.values() if isinstance(saes, Mapping) else saes if several else [saes]
    yield from (one for one in listed if isinstance(one, (str, Path)))  # type: ignore[attr-defined]


def _beside(what: object) -> Path | None:
    """Where the store of one run or SAE lies; None: that is seen when it is read."""
    one = [*_paths(what)]
    if len(one) != 1 or not as_path(one[0]).is_dir():
        return None
    place = as_path(one[0])
    own = (place / SAE_CONFIG).exists()
    if not own and not (place / "sae" / SAE_CONFIG).is_file():
        return None  # a sweep's folder
    return (place.parent if own and place.name == "sae" else place) / _STORE
