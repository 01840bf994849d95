"""SAEs of a release, from its entry to modules: one listing of the repository and one look at the format for all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from saekit.abilities import LocatesFiles
from saekit.config import PluginChoice
from saekit.config.converter import ConfigConverter
from saekit.errors import SAEFormatError, SaekitError
from saekit.hub_files import HubRepository
from saekit.kinds import PRETRAINED_LOADERS
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.pretrained.catalog import find_sae, nearest
from saekit.pretrained.load import load_sae, loader_of
from saekit.pretrained.probe import check
from saekit.released import Release, ReleasedSAE
from saekit.saved import SAEFiles

if TYPE_CHECKING:
    import torch

    from saekit.sae.module import SAEModule

__all__ = ["load_published"]


def load_published(
    release: Release,
    ids: Sequence[str | None],
    *,
    loader: PluginChoice | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    plugins: PluginManager | None = None,
    verify: bool = False,
) -> Iterator[tuple[str, SAEModule]]:
    """The SAEs of ``ids``, one after the other, each with its id.

    All of them are looked for before the first is loaded.  ``loader`` and ``revision`` are those of the release, unless
    they are given.  ``verify`` as for :meth:`saekit.SAE.load`.
    """
    plugins = plugins or default_manager()
    wanted = [find_sae(release, one) for one in ids]
    choice = _bound(release, loader, plugins)
    # What the files look like is looked at once: SAEs of one release are of one format.
    places = _Places(release, revision, token, None if choice is None else choice.build())
    files = [places.files_of(sae) for sae in wanted]
    if choice is None and files:
        choice = loader_of(files[0], plugins)
    for sae, where in zip(wanted, files, strict=True):
        origin = {"release": release.key, "sae_id": sae.id}
        loaded = load_sae(
            where, loader=choice, device=device, dtype=dtype, plugins=plugins, origin=origin,
            checked=check if verify else None,
        )  # fmt: skip
        known = {"model_name": release.model, "neuronpedia_id": sae.neuronpedia}
        metadata = {name: value for name, value in known.items() if value is not None}
        loaded.info = attrs.evolve(loaded.info, metadata={**metadata, **loaded.info.metadata})
        yield sae.id, loaded


def _bound(release: Release, loader: PluginChoice | None, plugins: PluginManager) -> Choice[Any] | None:
    """The loader that is given, or the release's: of that, one of the same source goes before others of its name."""
    if loader is None and release.loader is None:
        return None
    items = plugins.registry(PRETRAINED_LOADERS).items
    own = f"{release.source}:{release.loader}"
    key = own if any(item.key == own for item in items) else release.loader
    try:
        return ConfigConverter(plugins).choice(key if loader is None else loader, PRETRAINED_LOADERS)
    except SaekitError as error:
        if loader is None:
            error.add_note(f"It is the loader of the release {release.key}. loader=... names another.")
        raise


class _Places:
    """Where each SAE of a release lies; a repository is listed once."""

    def __init__(self, release: Release, revision: str | None, token: str | bool | None, loader: object) -> None:
        self._release, self._loader, self._repository = release, loader, None
        if release.repo is not None:
            self._repository = HubRepository.listed(release.repo, revision or release.revision, token)

    def files_of(self, sae: ReleasedSAE) -> SAEFiles:
        """The files of ``sae``, with what the release says of it beside them."""
        about = self._release.about(sae)
        if self._repository is None:
            return attrs.evolve(SAEFiles.at(f"{self._release.folder}/{sae.path}"), about=about)
        path = self._path(sae, self._repository.names)
        files = SAEFiles.on_hub(self._repository.repo_id, path, repository=self._repository)
        return attrs.evolve(files, about=about)

    def _path(self, sae: ReleasedSAE, names: Collection[str]) -> str:
        path = sae.path.strip("/")
        if path in names or any(name.startswith(f"{path}/") for name in names):
            return path
        found = self._loader.locate(path, names) if isinstance(self._loader, LocatesFiles) else None
        if found is not None:
            return found
        folders = {name.rpartition("/")[0] for name in names} - {""} | {*names}
        close = nearest(path, folders)
        raise SAEFormatError(
            f"the release {self._release.key} says that {sae.id!r} is {path!r} in {self._release.repo}, which has no "
            f"such file or folder"
            + (f"; there are {', '.join(close)}" if close else "")
            + ". The repository has changed: "
            "revision=... names an earlier state of it"
        )
