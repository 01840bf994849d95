"""Saved SAEs as they are at one moment: copied, and compared with the checksums that they have.  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

from saekit.errors import PlaceError, SAEFormatError, StorageError
from saekit.files.checksums import seal
from saekit.files.names import SAE_CONFIG, SAE_FILES, SAE_WEIGHTS
from saekit.files.storage import read_json, sha256

__all__ = ["copy_saved", "read_config"]

_TRIES = 3


def read_config(folder: Path) -> dict[str, Any]:
    """The ``cfg.json`` of a saved SAE, whose weights are there, too; :class:`PlaceError` for another folder."""
    missing = [name for name in (SAE_CONFIG, SAE_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise PlaceError(f"{folder} is no saved SAE: it has no {' and no '.join(missing)}")
    try:
        table = read_json(folder / SAE_CONFIG)
    except (OSError, ValueError) as error:
        raise PlaceError(f"{folder / SAE_CONFIG} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise PlaceError(f"{folder / SAE_CONFIG} does not hold an object")
    return table


def copy_saved(folder: Path, target: Path) -> Path:
    """Copy the files of one SAE to the new folder ``target``, whole; where a run saves it meanwhile, all of one save.

    :class:`PlaceError` where there is no saved SAE, :class:`SAEFormatError` for one that is not as it was saved, and
    :class:`StorageError` where it cannot be copied.
    """
    for left in reversed(range(_TRIES)):
        before = _config_bytes(folder)
        try:
            read_config(folder)
            rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for name in SAE_FILES:
                if (folder / name).is_file():
                    copyfile(folder / name, target / name)
            _check(target, folder)
            return target
        except (PlaceError, SAEFormatError, OSError) as error:
            if left and _config_bytes(folder) != before:  # it was saved again meanwhile
                continue
            if isinstance(error, OSError):
                text = f"cannot copy the SAE in {folder} to {target}: {error.strerror or error}"
                raise StorageError(text) from error
            raise
    raise AssertionError("there is a last try")


def _config_bytes(folder: Path) -> bytes | None:
    try:
        return (folder / SAE_CONFIG).read_bytes()
    except OSError:
        return None


def _check(copy: Path, folder: Path) -> None:
    """Compare with the checksums in ``cfg.json``, which other libraries and old folders do not have."""
    table = read_config(copy)
    own = table.get("saekit")
    if not isinstance(own, Mapping):
        return
    advice = "Nothing was pushed. Restore it, or load the SAE and save it anew"
    if "seal" in own and own["seal"] != seal(table):
        raise SAEFormatError(f"{SAE_CONFIG} in {folder} is damaged or was changed after it was saved. {advice}")
    sums = own.get("sha256", {})
    if not isinstance(sums, Mapping):
        raise SAEFormatError(f"saekit.sha256 in {SAE_CONFIG} of {folder} is {sums!r}, expected an object. {advice}")
    for name in SAE_FILES[:-1] if sums else ():
        file, expected = copy / name, sums.get(name)
        if expected is None:  # it belongs to other weights
            file.unlink(missing_ok=True)
        elif not file.is_file():
            raise SAEFormatError(
                f"{name} is missing in {folder}, and its {SAE_CONFIG} says that it was saved. {advice}"
            )
        elif (found := sha256(file)) != expected:
            raise SAEFormatError(
                f"{name} in {folder} is damaged or was changed after it was saved: its sha256 is {found[:12]}..., "
                f"expected {str(expected)[:12]}... {advice}"
            )
    read_config(copy)
