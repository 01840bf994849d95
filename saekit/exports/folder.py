"""The folder of an export: files that are whole or not there, and a record by which it goes on where it stopped.

``export.json`` says of what everything is, and the checksum of each file that is finished.  A file that it does not
know, or that is not what it says, is written again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self

import attrs

from saekit.errors import DataError, PlaceError, StorageError
from saekit.features.manifest import differences
from saekit.files.storage import read_json, sha256, tidy, write_bytes, write_text
from saekit.files.writers import one_writer

__all__ = ["RECORD", "ExportFolder", "check_empty", "exporting"]

RECORD, _FORMAT = "export.json", 1
_SETTINGS = "run_settings.json"
_FOLDERS = ("", "features", "activations")
_BATCH = r"batch-\d+\.json|(features|activations)/batch-\d+\.jsonl\.gz"
_OWN = re.compile(
    rf"{_BATCH}|skipped_indexes\.json|{re.escape(_SETTINGS)}|tokens_\d+\.pt|(release|model|sourceset|source)\.jsonl"
)
"""What an export writes: nothing else is removed, whatever a record names."""


@attrs.define(eq=False)
class ExportFolder:
    """What is in ``home`` so far, of the export that ``identity`` says."""

    home: Path
    identity: Mapping[str, Any]
    begun: str
    """When it was, as ISO 8601 has it; the same after it was gone on with."""
    files: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    """By path in the folder: ``bytes`` and ``sha256``."""

    @classmethod
    def opened(cls, home: Path, identity: Mapping[str, Any], now: str, *, overwrite: bool = False) -> Self:
        """What is there of this export; :class:`DataError` for another's, :class:`PlaceError` for other things.

        With ``overwrite``, another's is removed, and what is there beside it stays.
        """
        identity = json.loads(json.dumps(identity))
        replaced = overwrite and cls.remove(home)
        if not (home / RECORD).exists():
            if not replaced:
                check_empty(home)
            found = cls(home, identity, now)
            found._save()
            return found
        try:
            table = _record(home)
        except (OSError, ValueError) as error:
            _check_ours(home)
            raise DataError(
                f"{home / RECORD} cannot be read ({error}): begin anew with overwrite=True (--overwrite)"
            ) from error
        fits = table["format"] == _FORMAT
        lines = (
            [*differences(table["identity"], identity)]
            if fits
            else [f"format: there {table['format']}, wanted {_FORMAT}"]
        )
        if lines:
            listed = "\n".join(f"  - {line}" for line in lines[:12])
            raise DataError(
                f"{str(home)!r} holds another export:\n{listed}\n"
                "Choose another folder, or replace it with overwrite=True (--overwrite)"
            )
        for name in _FOLDERS:
            if (home / name).is_dir():
                tidy(home / name, functools.partial(_is_own, name))
        return cls(home, identity, table["begun"], table["files"])

    def has(self, *names: str) -> bool:
        """Whether all of these are there, as they were written."""
        return all(self._is_whole(name) for name in names)

    def _is_whole(self, name: str) -> bool:
        entry, path = self.files.get(name), self.home / name
        if entry is None or not path.is_file():
            return False
        return (path.stat().st_size, sha256(path)) == (entry["bytes"], entry["sha256"])

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files, and the record of them when they are whole."""
        for name, data in files.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
            self.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._save()

    def _save(self) -> None:
        table = {"format": _FORMAT, "identity": self.identity, "begun": self.begun, "files": self.files}
        write_text(self.home / RECORD, json.dumps(table, indent=1, allow_nan=False) + "\n")

    @staticmethod
    def remove(home: Path) -> bool:
        """Remove the export in ``home``, if there is one: what its record names, batches, and the record in the end;
        whether one was.  :class:`PlaceError` where that is the record of something else."""
        if not (home / RECORD).exists():
            return False
        _check_ours(home)
        try:
            names = {*_record(home)["files"]}
        except (OSError, ValueError):
            names = {_SETTINGS}
        folders = _FOLDERS[1:] if _schema_in(home) == "bulk" else _FOLDERS[:1]
        names |= {str(path.relative_to(home)) for one in folders for path in (home / one).glob("batch-*")}
        try:
            for name in sorted(name for name in names if _is_own("", name)):
                path = home / name
                if path.resolve().is_relative_to(home.resolve()):
                    path.unlink(missing_ok=True)
            (home / RECORD).unlink()
        except OSError as error:
            raise StorageError(f"cannot remove the export in {str(home)!r}: {error.strerror or error}") from error
        return True


def _is_own(folder: str, name: str) -> bool:
    return name == RECORD or _OWN.fullmatch(f"{folder}/{name}" if folder else name) is not None


def _record(home: Path) -> Mapping[str, Any]:
    """What the record says; :class:`OSError` or :class:`ValueError` for one that is damaged, or none of an export."""
    table = read_json(home / RECORD)
    if not _is_record(table):
        raise ValueError("it is not what an export's record is")
    for name, entry in table["files"].items():
        if not isinstance(entry, dict) or [type(entry.get(one)) for one in ("bytes", "sha256")] != [int, str]:
            raise ValueError(f"of {name!r} it does not say bytes and sha256")
    return table  # type: ignore[no-any-return]


def _is_record(table: object) -> bool:
    kinds = {"format": int, "identity": dict, "begun": str, "files": dict}
    if not isinstance(table, dict) or any(type(table.get(name)) is not kind for name, kind in kinds.items()):
        return False
    return {"neuronpedia_id", "options", "contexts", "SAE"} <= {*table["identity"]}


def _schema_in(home: Path) -> object:
    """The schema of the export in ``home``, by its record, or by its settings where that cannot be read; None: none."""
    with suppress(OSError, ValueError):
        table = read_json(home / RECORD)
        if _is_record(table) and isinstance(options := table["identity"]["options"], dict):
            return options.get("schema")
    with suppress(OSError, ValueError):
        table = read_json(home / _SETTINGS)
        if isinstance(table, dict) and {"schema", "saekit_version"} <= table.keys():
            return table["schema"]
    return None


def _check_ours(home: Path) -> None:
    """:class:`PlaceError` where what is called as the record of an export is something else."""
    if _schema_in(home) is None:
        raise PlaceError(_something_else(home, [RECORD]))


def check_empty(home: Path) -> None:
    """:class:`PlaceError` for a folder in which other things are."""
    if others := sorted(path.name for path in home.iterdir() if not path.name.startswith(".")):
        raise PlaceError(_something_else(home, others))


def _something_else(home: Path, names: Sequence[str]) -> str:
    return (
        f"{str(home)!r} holds something else ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): an "
        "export needs a folder of its own; name a new one (folder)"
    )


def exporting(home: Path, *, whole: bool = False) -> AbstractContextManager[None]:
    """For one writer at a time; what the disk refuses is told with how to go on.

    ``whole``: nothing of an export is kept until all of it is there.
    """
    go_on = "What is finished is kept; when there is room, the same call goes on after it"
    anew = "Nothing of it is kept, and what was there before is; when there is room, the same call makes it"
    return one_writer(home, "export", "exporting into", anew if whole else go_on)
