"""What ``from_pretrained`` is asked for: an SAE of a release, one of a repository, or one that lies here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import attrs

from saekit.errors import ConfigError, SaekitError, UnknownKeyError
from saekit.files.paths import as_path
from saekit.hub import is_path
from saekit.plugins.manager import PluginManager
from saekit.pretrained.catalog import Catalog
from saekit.released import Release

__all__ = ["Asked", "ReleaseFiles", "asked_for", "catalog_of", "find_release", "hinting_at_release"]

ReleaseFiles: TypeAlias = str | Path | Sequence[str | Path]


@attrs.frozen(kw_only=True)
class Asked:
    """One of the three."""

    release: Release | None = None
    sae_id: str | None = None
    repo_id: str | None = None
    folder: str = ""
    path: Path | None = None
    hint: str = ""
    """What an error about it should say, too."""

    @contextmanager
    def hinting(self) -> Iterator[None]:
        """Errors from inside say it."""
        try:
            yield
        except SaekitError as error:
            if self.hint:
                error.add_note(self.hint)
            raise


def catalog_of(files: ReleaseFiles, plugins: PluginManager | None) -> Catalog:
    """All releases, with those of ``files``."""
    return Catalog([files] if isinstance(files, str | os.PathLike) else files, plugins)


def find_release(name: str, *, releases: ReleaseFiles = (), plugins: PluginManager | None = None) -> Release:
    """The release called ``name``, without loading anything: its repository, and ``saes`` by their ids.

    ``releases`` are TOML files of releases, beside those that are known.  Imports no torch.
    :class:`saekit.errors.UnknownKeyError` for a name that is none has the nearest.
    """
    return catalog_of(releases, plugins).find(name)


@contextmanager
def hinting_at_release(path: str | Path, plugins: PluginManager | None = None) -> Iterator[None]:
    """Errors about a path that is not there say so where it is the name of a release, ``RELEASE:ID`` or a repository's.

    For what takes a path alone.
    """
    try:
        yield
    except SaekitError as error:
        with suppress(OSError, RuntimeError, ValueError, SaekitError):  # of what is no path, and of lists of releases
            if not as_path(path).exists() and (hint := _release_hint(os.fspath(path), plugins)):
                error.add_note(hint)
        raise


def _release_hint(text: str, plugins: PluginManager | None) -> str:
    catalog = catalog_of((), plugins)
    by_name = {name: one for one in catalog.releases for name in (one.name, one.key)}
    name, sae_id = (text, "") if text in by_name else text.rpartition(":")[::2]
    if (release := by_name.get(name)) is None:
        repo, folder = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
        if not (known := [one.name for one in catalog.of_repo(repo)]):
            return ""
        return (
            f"{repo} is a repository of the Hub: saekit.SAE.from_hub({repo!r}, {folder or 'FOLDER'!r}) loads an SAE of "
            f"it, and saekit.SAE.from_pretrained(RELEASE, ID) one of {' or '.join(known)}"
        )
    if not sae_id and len(release.ids) == 1:
        return (
            f"{name} is a published SAE: saekit.SAE.from_pretrained({name!r}) loads it, and save(FOLDER) on "
            "that makes a folder of it"
        )
    if sae_id in release.ids:
        return (
            f"{text} is a published SAE: saekit.SAE.from_pretrained({name!r}, {sae_id!r}) loads it, and "
            "save(FOLDER) on that makes a folder of it"
        )
    return (
        f"{name} is a release of published SAEs: saekit.SAE.from_pretrained({name!r}, ID) loads one, and `saekit saes "
        f"info {name}` lists their ids"
    )


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
        releases = [one.name for one in catalog.of_repo(text)]
        if "/" in text and (sae_id is not None or not releases):
            hint = f"By their ids its SAEs are found by the name of a release: {', '.join(releases)}."
            return Asked(repo_id=text, folder=sae_id or "", hint=hint if releases else "")
        raise


def _here(path: Path, sae_id: str | None) -> Asked:
    return Asked(path=path if sae_id is None else path / sae_id)
