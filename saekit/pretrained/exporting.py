"""From an SAE to files of a format, by the loader that reads it: what the format has no place for is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.abilities import WritesSAEs
from saekit.ambient import ambient
from saekit.config import PluginChoice
from saekit.config.converter import ConfigConverter
from saekit.errors import PlaceError, SAEFormatError, StorageError
from saekit.files.names import fault_of_name
from saekit.files.paths import as_path
from saekit.files.storage import add_files, new_files, new_folder, tidy
from saekit.kinds import PRETRAINED_LOADERS
from saekit.plugins.building import blamed, built, returned
from saekit.plugins.choice import Choice
from saekit.plugins.manager import PluginManager, default_manager
from saekit.pretrained.detecting import usable
from saekit.pretrained.provenance import OWN

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["export", "formats"]


def formats(plugins: PluginManager | None = None) -> list[str]:
    """The names of the formats that an SAE can be written in, saekit's own first."""
    items = [item for item in (plugins or default_manager()).registry(PRETRAINED_LOADERS).items if usable(item)]
    return [OWN, *sorted(item.key for item in items if isinstance(built(item, None), WritesSAEs))]


@ambient()
def export(
    sae: SAEModule,
    folder: str | os.PathLike[str],
    format: PluginChoice,  # noqa: A002 - as people say it
    *,
    plugins: PluginManager | None = None,
) -> Path:
    """Write ``sae`` to ``folder`` in a format of :func:`formats`; returns the folder.

    ``format`` is the key of the loader that reads it, or that with options, as for :meth:`saekit.SAE.load`.  The folder
    may be there, with other layers in it: all files are added or none, and none takes the place of another.

    :class:`SAEFormatError` says what of ``sae`` the format has no place for, and :class:`StorageError` why the folder
    cannot be written.
    """
    path, plugins = as_path(folder), plugins or default_manager()
    if format == OWN:
        from saekit.sae.folder import save_sae

        return _placed(path, lambda home: save_sae(sae, home))
    choice = ConfigConverter(plugins).choice(format, PRETRAINED_LOADERS)
    loader = choice.build()
    if not isinstance(loader, WritesSAEs):
        raise SAEFormatError(f"{choice.key} only reads; what can be written is {', '.join(formats(plugins))}")
    if sae.info.scale_is_unknown:
        raise SAEFormatError(
            f"the SAE cannot be written as {choice.key}: it takes activations that are scaled by a factor that nobody "
            "knows, and no other library is told so. Call sae.fold_activation_scale(factor) first"
        )
    return _placed(path, lambda home: _write(loader, choice, sae, home))


def _placed(path: Path, write: Callable[[Path], object]) -> Path:
    """``path``, with the files that ``write`` leaves in an empty folder: all of them, or none."""
    target = _target(path)
    try:
        if target.exists():
            with new_files(target / "export") as home:
                write(home)
                add_files(target, home)
        else:
            tidy(target.parent, target.name.__eq__)  # what a process that was killed in between has left
            with new_folder(target, replace=False) as home:
                write(home)
    except FileExistsError as error:
        raise PlaceError(
            f"cannot write the SAE to {path}: {error.strerror}, {error.filename}. Move it away, or "
            "choose another folder"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot write the SAE to {path}: {error.strerror or error}") from error
    return path


def _target(path: Path) -> Path:
    """Where ``path`` leads; :class:`StorageError` says why it is no place for files of an SAE."""
    from saekit.sae.folder import part_of_run

    where = f"cannot write the SAE to {str(path)!r}: "
    if "\0" in str(path):
        raise PlaceError(f"{where}a path cannot hold a null character")
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise PlaceError(f"{where}there is a file of that name; give a folder, which may be new")
        if not target.exists() and (fault := fault_of_name(target.name)):
            raise PlaceError(f"{where}the name {fault}; choose another")
        if kind := part_of_run(target):
            raise PlaceError(f"{where}it is {kind}; choose another folder, or a new one in it")
    except OSError as error:
        raise StorageError(f"{where}{error.strerror or error}") from error
    return target


def _write(loader: WritesSAEs, choice: Choice[Any], sae: SAEModule, home: Path) -> None:
    with blamed(choice.item, "write_sae"):
        try:
            loader.write_sae(sae, home)
        except OSError as error:  # of the disk, which is nobody's fault
            raise StorageError(f"cannot write the SAE: {error.strerror or error}") from error
    if not any(path.is_file() for path in home.rglob("*")):
        raise returned(choice.item, "write_sae", None, "and has written no file")
