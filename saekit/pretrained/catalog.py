"""All releases that are known here: those that come with saekit, of plugins, and of users' own files.

Nothing here imports torch, and other people's plugins are loaded only where there are any.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from saekit.cautions import warn
from saekit.errors import AmbiguousKeyError, ConfigError, PluginWarning, UnknownKeyError
from saekit.files.paths import as_path
from saekit.pretrained.hooks_of import with_hooks
from saekit.pretrained.releases import BUILT_IN, read_releases
from saekit.reasons import error_text
from saekit.released import Release, ReleasedSAE

if TYPE_CHECKING:
    from saekit.plugins.manager import PluginManager

__all__ = ["RELEASES_VARIABLE", "Catalog", "find_sae", "nearest", "users_files"]

RELEASES_VARIABLE = "SAEKIT_RELEASES"
"""Paths of files with releases, separated as in PATH."""
_OWN = "saekit"
_MOST = 8


class Catalog:
    """Releases by name.

    ``files`` are TOML files of releases beside those that ``SAEKIT_RELEASES`` names and
    ``~/.config/saekit/releases.toml``.
    """

    def __init__(self, files: Iterable[str | Path] = (), plugins: PluginManager | None = None) -> None:
        found = [*_built_in()]
        for path in dict.fromkeys([*users_files(), *map(as_path, files)]):
            found += read_releases(path).releases()
        self.releases: list[Release] = with_hooks([*found, *_of_plugins(plugins)], _OWN)

    def find(self, name: str) -> Release:
        """The release called ``name``, or ``saekit:name``; :class:`UnknownKeyError` has the nearest."""
        found = [one for one in self.releases if name in (one.name, one.key)]
        if len(found) == 1:
            return found[0]
        if found:
            keys = ", ".join(dict.fromkeys(one.key for one in found))
            owners = " and ".join(dict.fromkeys(one.where for one in found))
            what = f"write one of {keys}" if len({one.key for one in found}) == len(found) else "rename one"
            raise AmbiguousKeyError(f"the release {name!r} is there more than once, from {owners}: {what}")
        raise UnknownKeyError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        by_repo = [one.name for one in self.releases if one.repo == name]
        names = {one.name: None for one in self.releases}
        close = by_repo or nearest(name, names)
        hint = f" Did you mean {_listed(close)}?" if close else ""
        owner = f" ({by_repo[0]} is of that repository)" if by_repo else ""
        return (
            f"there is no release {name!r}{owner}.{hint} `saekit saes list` lists all {len(names)}; of a repository "
            "that is none of them: from_pretrained(repo_id=..., folder=...)"
        )

    def of_repo(self, repo: str) -> list[Release]:
        """Those of a repository of the Hub."""
        return [one for one in self.releases if one.repo == repo]


def find_sae(release: Release, sae_id: str | None) -> ReleasedSAE:
    """The SAE of that id; of a release of one, None is that.  :class:`UnknownKeyError` has the nearest."""
    if sae_id is None and len(release.ids) == 1:
        return release.saes[release.ids[0]]
    if sae_id in release.ids:
        return release.saes[sae_id]
    close = []
    if sae_id is not None:
        sae_id = str(sae_id)  # somebody may have written 8
    if sae_id:  # perhaps by another of its names
        close = [one for one, sae in release.saes.items() if sae_id in (sae.path, sae.neuronpedia)]
        number = rf"(?<!\d){sae_id}(?!\d)" if sae_id.isdecimal() else r"(?!)"  # of a layer, as it looks
        close = close[:1] or nearest(sae_id, release.ids) or [one for one in release.ids if re.search(number, one)][:3]
    what = f"has no SAE {sae_id!r}." if sae_id else f"has {len(release.ids)} SAEs; say which."
    hint = f" Did you mean {_listed(close)}?" if close else ""
    some = ", ".join(release.ids[:_MOST]) + (", ..." if len(release.ids) > _MOST else "")
    shown = "" if close else f" It has {some}."
    raise UnknownKeyError(
        f"the release {release.name!r} {what}{hint}{shown} `saekit saes info {release.name}` lists all"
    )


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Those of ``names`` that are most like ``name``: what begins or ends so, then what is spelled alike."""
    folded = {_folded(one): one for one in names}
    wanted = _folded(name)
    close = difflib.get_close_matches(wanted, folded, n=most, cutoff=0.6)
    inside = [one for one in folded if wanted and wanted in one] if len(wanted) > 3 else []
    return [folded[one] for one in dict.fromkeys([*close[:1], *inside, *close[1:]])][:most]


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-")


def _listed(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


@cache
def _built_in() -> tuple[Release, ...]:
    return tuple(read_releases(Path(__file__).with_name(BUILT_IN), _OWN).releases())


def users_files() -> Iterator[Path]:
    """Whose files of releases there are: those that the environment names, which must be there, and the one at home."""
    for path in os.environ.get(RELEASES_VARIABLE, "").split(os.pathsep):
        if path.strip():
            yield as_path(path.strip())
    home = Path(os.environ.get("XDG_CONFIG_HOME") or as_path("~/.config"), "saekit", "releases.toml")
    if home.is_file():
        yield home


def _of_plugins(plugins: PluginManager | None) -> Iterator[Release]:
    """What the hook gives.  A plugin that fails is a warning, and everybody else's are there."""
    if plugins is None and not _others():
        return
    from saekit.kinds import RELEASES
    from saekit.plugins.manager import default_manager

    manager = plugins or default_manager()
    for item in manager.registry(RELEASES).items:
        try:
            found = [*manager.build(RELEASES, item.entry.config()).releases()]
            if wrong := [one for one in found if not isinstance(one, Release)]:
                raise ConfigError(f"releases() gave {wrong[0]!r}, expected a saekit.pretrained.Release")
            yield from (_owned(one, item.distribution, item.plugin) for one in found)
        except Exception as error:
            notes = getattr(error, "__notes__", ())
            text = " ".join([error_text(error), *notes])
            warn(f"the releases of {item.key} were left out: {text}", PluginWarning)


def _owned(release: Release, distribution: str, plugin: str) -> Release:
    return attrs.evolve(release, source=distribution, where=f"the plugin {plugin}")


def _others() -> bool:
    """Whether anybody else's plugin is installed: saekit's own bring no releases, and to load them takes a while."""
    from saekit.plugins.loading import installed_points

    return any(point.distribution != _OWN for point in installed_points())
