"""Which feature store is meant: one that is given, or that lies beside an SAE, or that is made.

As in :mod:`saekit.commands.jobs`, what does the work is imported when what can be seen to be wrong has been looked at.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.beforehand import check_named
from saekit.commands.features import STORE, beside, collect_features
from saekit.commands.subjects import Subject, at_home, subjects_of
from saekit.errors import ConfigError, DataError, PlaceError
from saekit.files.paths import as_path
from saekit.plugins.manager import PluginManager, default_manager
from saekit.plugins.text import short

if TYPE_CHECKING:
    from saekit.features.manifest import StoreManifest
    from saekit.features.store import FeatureStore

__all__ = ["is_store", "named_of", "store_beside", "store_given", "store_of", "which_of"]

_NO_MATTER = {"device", "batch_size"}
"""Options of collecting that do not decide what is found."""

_REPLACE = (
    "A store is replaced by collecting it anew: saekit.collect_features(..., overwrite=True), "
    "saekit features --overwrite"
)


def is_store(what: object) -> bool:
    """Whether ``what`` is a feature store, one SAE of it, or the folder of one, which may be damaged."""
    from saekit.features.store import FeatureStore, SAEFeatures

    if not isinstance(what, (str, Path)):
        return isinstance(what, (FeatureStore, SAEFeatures))
    return FeatureStore.is_at(what)


def store_given(what: object) -> FeatureStore | None:
    """The feature store that ``what`` is, is an SAE of, or names the folder of; None: it is something else."""
    from saekit.features.store import FeatureStore, SAEFeatures

    if isinstance(what, FeatureStore):
        return what
    if isinstance(what, SAEFeatures) and isinstance(what.store, FeatureStore):
        return what.store
    return FeatureStore.open(what) if isinstance(what, (str, Path)) and is_store(what) else None


def which_of(what: object) -> str | None:
    """The name of the SAE that ``what`` is of a feature store; None: it is something else."""
    from saekit.features.store import SAEFeatures

    return what.name if isinstance(what, SAEFeatures) else None


def named_of(what: object, sae: str | None) -> str | None:
    """The SAE that is meant of a store: ``sae``, or the one that ``what`` is; :class:`ConfigError` for two of them."""
    own = which_of(what)
    if None not in (own, sae) and own != sae:
        raise ConfigError(
            [("sae", f"is {short(sae)}, and what is given is {own!r} alone: leave sae out, or give the whole store")]
        )
    return own if sae is None else sae


def store_beside(where: object) -> FeatureStore:
    """The feature store that is meant: one that is open, its folder, or a run or an SAE with one beside it."""
    if (given := store_given(where)) is not None:
        return given
    where = getattr(where, "folder", None) or getattr(where, "read_from", None) or where  # of a result, of an SAE
    if not isinstance(where, (str, Path)):
        raise ConfigError(
            [("features", f"must be a feature store, its folder, a run, or an SAE that was read from a folder, "
              f"found {short(where)}")]
        )  # fmt: skip
    place = as_path(where)
    near = [place / STORE, *([place.parent / STORE] if place.name == "sae" else [])]
    found = next((one for one in map(store_given, near) if one is not None), None)
    if found is not None:
        _check_of(found.manifest, found.folder, subjects_of(place, default_manager(), device="cpu"))
        return found
    if not place.exists():
        published = ":" in str(where) and "/" not in str(where).partition(":")[0]
        how = "Collect the features into a folder (saekit features ... --folder FOLDER), and name that"
        raise PlaceError(f"there is no folder {str(place)!r}. {how if published else 'Name a feature store, or a run'}")
    raise PlaceError(
        f"there are no features of {str(place)!r} yet: collect them first (saekit features {place}), or name the "
        "folder in which they are"
    )


def store_of(
    what: object,
    folder: str | Path | None = None,
    collecting: Mapping[str, Any] | None = None,
    *,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    check: Callable[[Mapping[str, int]], None] | None = None,
) -> FeatureStore:
    """The store that ``what`` is, or that is kept of it; collected where there is none.

    Where ``collecting`` has options that decide what is found, a store must have been made with them.  None is ever
    replaced: :class:`DataError` for one that was made with others.  Before anything is collected, ``check`` is called
    with the names of the SAEs and how many features each has.
    """
    if "overwrite" in (collecting or {}):
        raise ConfigError([("overwrite", f"replaces no feature store here. {_REPLACE}")])
    _check_names(collecting or {})
    asked = {name: value for name, value in (collecting or {}).items() if value is not None}
    if (given := store_given(what)) is not None:
        return _only(given, asked, folder)
    check_named(what)
    options = {"folder": folder, "verbose": verbose, "plugins": plugins, **asked}
    decides = asked.keys() - _NO_MATTER
    if not decides and (found := _there(what, folder, plugins or default_manager())) is not None:
        return found
    if check is not None:
        check(_sizes_of(what, plugins or default_manager()))
    return collect_features(what, **options)


def _sizes_of(what: object, plugins: PluginManager) -> dict[str, int]:
    """How many features each SAE has, by name; the SAEs themselves are not kept while these are collected."""
    subjects = at_home(subjects_of(what, plugins, device="cpu"), plugins)
    return {name: one.sae.d_sae for name, one in subjects.items()}


def _check_names(collecting: Mapping[str, Any]) -> None:
    """:class:`ConfigError` for options that :func:`saekit.collect_features` has not."""
    known = [*inspect.signature(collect_features).parameters][1:]
    for name in collecting:
        if name not in known:
            like = " or ".join(difflib.get_close_matches(name, known, n=2))
            hint = f"; did you mean {like}?" if like else ", nor of saekit.collect_features"
            raise ConfigError([(name, f"is not an option of this{hint}")])


def _only(store: FeatureStore, asked: Mapping[str, Any], folder: str | Path | None) -> FeatureStore:
    """A store that is given, and needs nothing else."""
    others = [*asked, *([] if folder is None else ["folder"])]
    if others:
        raise ConfigError(
            f"{', '.join(others)}: nothing is collected, as {str(store.folder)!r} is a feature store already; leave "
            "that out, or give the SAE instead"
        )
    return store


def _there(what: object, folder: str | Path | None, plugins: PluginManager) -> FeatureStore | None:
    """The finished store of the SAEs in its place; None where there is none."""
    from saekit.features.manifest import MANIFEST, StoreManifest
    from saekit.features.store import FeatureStore

    if folder is not None and not (as_path(folder) / MANIFEST).is_file():
        return None
    subjects = at_home(subjects_of(what, plugins, device="cpu"), plugins)
    place = beside(subjects) if folder is None else as_path(folder)
    if not (place / MANIFEST).is_file():
        return None
    manifest = StoreManifest.load(place)
    _check_of(manifest, place, subjects)
    return FeatureStore.open(place)


def _check_of(manifest: StoreManifest, place: Path, subjects: Mapping[str, Subject]) -> None:
    """:class:`DataError` unless the store in ``place`` has all of these SAEs, as they are now."""
    if unlike := _unlike(manifest, {name: one.sae for name, one in subjects.items()}):
        known = ", ".join(one.name for one in manifest.saes)
        raise DataError(
            f"the feature store {str(place)!r} is of {known}, and not of {unlike} as it is now (the checksums of the "
            f"weights differ). Choose another folder. {_REPLACE}"
        )


def _unlike(manifest: StoreManifest, saes: Mapping[str, Any]) -> str | None:
    """The first of ``saes`` that is not in the store."""
    from saekit.features.subject import checksum

    known = {one.checksum for one in manifest.saes}
    return next((name for name, one in saes.items() if checksum(one) not in known), None)
