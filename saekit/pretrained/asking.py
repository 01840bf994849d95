"""What ``from_pretrained`` is asked for: an SAE of a release, one of a repository, or one that lies here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import attrs

from saekit.errors import ConfigError, UnknownKeyError
from saekit.files.paths import as_path
from saekit.hub import is_path
from saekit.plugins.manager import PluginManager
from saekit.pretrained.catalog import Catalog
from saekit.released import Release

__all__ = ["Asked", "ReleaseFiles", "asked_for", "catalog_of", "find_release"]

ReleaseFiles: TypeAlias = str | Path | Sequence[str | Path]


@attrs.frozen(kw_only=True)
class Asked:
    """One of the three."""

    release: Release | None = None
    sae_id: str | None = None
    repo_id: str | None = None
    folder: str = ""
    path: Path | None = None


def catalog_of(files: ReleaseFiles, plugins: PluginManager | None) -> Catalog:
    """All releases, with those of ``files``."""
    return Catalog([files] if isinstance(files, str | os.PathLike) else files, plugins)


def find_release(name: str, *, releases: ReleaseFiles = (), plugins: PluginManager | None = None) -> Release:
    """The release called ``name``, without loading anything: its repository, and ``saes`` by their ids.

    ``releases`` are TOML files of releases, beside those that are known.  Imports no torch.
    :class:`saekit.errors.UnknownKeyError` for a name that is none has the nearest.
    """
    return catalog_of(releases, plugins).find(name)


def asked_for(
    name: str | Path | None,
    sae_id: str | None,
    repo_id: str | None,
    folder: str,
    files: ReleaseFiles,
    plugins: PluginManager | None,
) -> Asked:
    """Which of the three it is; :class:`ConfigError` for what is none, or two of them."""
    if repo_id is not None:
        if name is not None or sae_id is not None:
            what = f"the release {name!r}" if name is not None else f"sae_id = {sae_id!r}, which is of a release,"
            raise ConfigError(
                f"from_pretrained is given {what} and repo_id = {repo_id!r}: give one; folder=... says where"
            )
        return Asked(repo_id=repo_id, folder=folder)
    if name is None:
        raise ConfigError("from_pretrained needs a release and an id, repo_id=... and folder=..., or a path")
    if folder:
        raise ConfigError(f"folder = {folder!r} goes with repo_id=...; of a release, sae_id says which SAE")
    text = os.fspath(name)
    if isinstance(name, Path) or is_path(text):
        return _here(as_path(name), sae_id)
    catalog = catalog_of(files, plugins)
    try:
        return Asked(release=catalog.find(text), sae_id=sae_id)
    except UnknownKeyError:
        if as_path(text).exists():
            return _here(as_path(text), sae_id)
        if "/" in text and not catalog.of_repo(text):
            return Asked(repo_id=text, folder=sae_id or "")
        raise


def _here(path: Path, sae_id: str | None) -> Asked:
    return Asked(path=path if sae_id is None else path / sae_id)
