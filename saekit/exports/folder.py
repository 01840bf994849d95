"""The folder of an export: files that are whole or not there, and a record by which it goes on where it stopped.

``export.json`` says of what everything is, and the checksum of each file that is finished.  A file that it does not
know, or that is not what it says, is written again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import attrs

from saekit.errors import DataError, PlaceError, StorageError
from saekit.features.manifest import differences
from saekit.files.storage import locked, read_json, sha256, tidy, write_bytes, write_text

__all__ = ["RECORD", "ExportFolder", "check_empty", "exporting"]

RECORD, _FORMAT = "export.json", 1
_BATCH = re.compile(r"batch-\d+\.(json|jsonl\.gz)")


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
            table = read_json(home / RECORD)
            there, begun, files = dict(table["identity"]), str(table["begun"]), dict(table["files"])
            fits = table["format"] == _FORMAT
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{home / RECORD} cannot be read ({error}): begin anew with overwrite=True (--overwrite)"
            ) from error
        lines = [*differences(there, identity)] if fits else [f"format: there {table['format']}, wanted {_FORMAT}"]
        if lines:
            listed = "\n".join(f"  - {line}" for line in lines[:12])
            raise DataError(
                f"{str(home)!r} holds another export:\n{listed}\n"
                "Choose another folder, or replace it with overwrite=True (--overwrite)"
            )
        tidy(home, lambda name: True)
        return cls(home, identity, begun, files)

    def has(self, *names: str) -> bool:
        """Whether all of these are there, as they were written."""
        return all(self._is_whole(name) for name in names)

    def _is_whole(self, name: str) -> bool:
        entry, path = self.files.get(name), self.home / name
        if entry is None or not path.is_file():
            return False
        return path.stat().st_size == entry.get("bytes") and sha256(path) == entry.get("sha256")

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
        """Remove the export in ``home``, if there is one: its record, what that names, and batches; whether one was."""
        if not (home / RECORD).exists():
            return False
        try:
            names = set(read_json(home / RECORD)["files"])
        except (OSError, ValueError, LookupError, TypeError):
            names = set()
        names |= {str(path.relative_to(home)) for path in home.rglob("batch-*.json*") if _BATCH.fullmatch(path.name)}
        try:
            (home / RECORD).unlink()
            for name in names:
                path = home / name
                if path.resolve().is_relative_to(home.resolve()):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove the export in {str(home)!r}: {error.strerror or error}") from error
        return True


def check_empty(home: Path) -> None:
    """:class:`PlaceError` for a folder in which other things are."""
    if others := sorted(path.name for path in home.iterdir() if not path.name.startswith(".")):
        raise PlaceError(
            f"{str(home)!r} holds something else ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): an "
            "export needs a folder of its own; name a new one (folder)"
        )


@contextmanager
def exporting(home: Path) -> Iterator[None]:
    """For one writer at a time; what the disk refuses is a :class:`StorageError` that says how to go on."""
    made = [one for one in (home, *home.parents) if not one.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(
            f"no export can be made in {str(home)!r}: {error.strerror or error}. Name another folder"
        ) from error
    try:
        with locked(home):
            yield
    except BlockingIOError as error:
        raise DataError(f"another process is exporting into {str(home)!r}") from error
    except PlaceError:
        raise
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        why = getattr(cause, "strerror", None) or error
        raise StorageError(
            f"cannot write the export {str(home)!r}: {why}. What is finished is kept; when there is room, the same "
            "call goes on after it"
        ) from error
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()  # as far as there is nothing in it
