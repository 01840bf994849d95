"""What is collected so far, on disk: parts that are there whole or not at all, and from which a pass goes on.

They lie in the store's folder, in ``collecting``::

    collecting/
        progress.json             what is collected, how far it is, and the checksums of the parts
        part-00000/               0.safetensors, 1.safetensors ...: activations of each SAE on some contexts
        part-00001/               sums.safetensors: the sums of all that is there, in the last one only
        whole/                    the finished files, until they are moved to their places
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import attrs
from torch import Tensor

from saekit.errors import DataError, PlaceError, StorageError
from saekit.features.manifest import MANIFEST, StoreManifest, differences
from saekit.files.storage import locked, new_folder, parse_json, read_json, sha256, write_text
from saekit.files.tensors import save_tensors

__all__ = ["COLLECTING", "Parts", "check_place", "opened_for", "remove_store", "storing"]

COLLECTING, PROGRESS, SUMS = "collecting", "progress.json", "sums.safetensors"


@attrs.define(eq=False)
class Parts:
    """The parts in ``folder`` of what ``identity`` says."""

    folder: Path
    identity: Mapping[str, Any]
    names: list[str] = attrs.field(factory=list)
    contexts: int = 0
    """Those that are done."""
    files: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    @classmethod
    def opened(cls, store: Path, identity: Mapping[str, Any]) -> Self:
        """Those that are there, or none yet; :class:`DataError` for those of something else, and for damaged ones."""
        folder = store / COLLECTING
        parts = cls(folder, identity)
        if not (folder / PROGRESS).exists():
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            parts._save()
            return parts
        try:
            table = read_json(folder / PROGRESS)
            lines = [*differences(table["identity"], identity)]
            found = cls(folder, identity, list(table["parts"]), int(table["contexts"]), dict(table["files"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / PROGRESS} cannot be read ({error}): begin anew with overwrite=True (--overwrite)"
            ) from error
        if lines:
            raise DataError(_another(store, "the beginning of another feature store", lines))
        found._check()
        return found

    def _check(self) -> None:
        for name, entry in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                what = "is not what was written" if path.exists() else "is missing"
                raise DataError(
                    f"what was collected so far cannot be gone on with: {path} {what}. Begin anew with overwrite=True "
                    "(--overwrite)"
                )
        for left in self.folder.iterdir():  # of a part that was not finished
            if left.is_dir() and left.name not in self.names:
                shutil.rmtree(left)

    def add(self, rows: Sequence[Mapping[str, Tensor]], sums: Mapping[str, Tensor], contexts: int) -> None:
        """A further part, after which ``contexts`` are done."""
        name = f"part-{len(self.names):05d}"
        new: dict[str, dict[str, Any]] = {}
        with new_folder(self.folder / name) as home:
            every: dict[str, Mapping[str, Tensor]] = {f"{i}.safetensors": one for i, one in enumerate(rows)}
            for file, tensors in (every | {SUMS: sums}).items():
                digest = save_tensors(home / file, tensors)
                new[f"{name}/{file}"] = {"bytes": (home / file).stat().st_size, "sha256": digest}
        before = f"{self.names[-1]}/{SUMS}" if self.names else None
        self.names.append(name)
        self.contexts = contexts
        self.files |= new
        self.files.pop(before or "", None)
        self._save()
        if before is not None:
            (self.folder / before).unlink(missing_ok=True)

    def _save(self) -> None:
        table = {"identity": self.identity, "parts": self.names, "contexts": self.contexts, "files": self.files}
        write_text(self.folder / PROGRESS, json.dumps(table, indent=1) + "\n")

    def remove_if_empty(self) -> None:
        """Leave nothing of what never began."""
        if not self.names:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()

    def rows_of(self, number: int) -> list[Path]:
        """The files of an SAE, in the order of the text."""
        return [self.folder / name / f"{number}.safetensors" for name in self.names]

    @property
    def sums(self) -> Path | None:
        """The sums of all that is there."""
        return self.folder / self.names[-1] / SUMS if self.names else None


def check_place(store: Path) -> None:
    """:class:`PlaceError` for a folder that holds something else than a store or the beginning of one."""
    if store.exists() and not store.is_dir():
        raise PlaceError(f"{str(store)!r} is a file: a feature store is a folder; name another one (folder)")
    if not store.is_dir() or any((store / name).exists() for name in (MANIFEST, COLLECTING)):
        return
    if others := sorted(path.name for path in store.iterdir() if not path.name.startswith(".")):
        raise PlaceError(
            f"{str(store)!r} holds something else ({', '.join(others[:3])}{' ...' if len(others) > 3 else ''}): a "
            "feature store needs a folder of its own; name a new one (folder)"
        )


def opened_for(store: Path, wanted: StoreManifest) -> bool:
    """Whether the very store that is ``wanted`` is there, finished; :class:`DataError` names what another has."""
    if not (store / MANIFEST).exists():
        return False
    found = StoreManifest.load(store)
    if lines := [*differences(found.identity, wanted.identity)]:
        raise DataError(_another(store, "another feature store", lines))
    return True


def _another(store: Path, what: str, lines: Sequence[str]) -> str:
    listed = "\n".join(f"  - {line}" for line in lines[:12])
    how = "Choose another folder, or replace it with overwrite=True (--overwrite)"
    return f"{str(store)!r} holds {what}:\n{listed}\n{how}"


def remove_store(store: Path) -> None:
    """Remove a store, finished or not, and nothing else."""
    try:
        names = ["contexts.safetensors", "vocabulary.json"]
        if (store / MANIFEST).exists():
            table = parse_json((store / MANIFEST).read_text(encoding="utf-8"))
            names += list(table.get("files", {})) if isinstance(table, dict) else []
        (store / MANIFEST).unlink(missing_ok=True)
        for name in names:
            path = store / name
            if path.resolve().is_relative_to(store.resolve()):
                path.unlink(missing_ok=True)
        shutil.rmtree(store / COLLECTING, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot remove the feature store {str(store)!r}: {error}") from error


@contextmanager
def storing(store: Path) -> Iterator[None]:
    """For one writer at a time; what the disk refuses is a :class:`StorageError` that says how to go on."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(
            f"no feature store can be made in {str(store)!r}: {error.strerror or error}. Name another folder"
        ) from error
    try:
        with locked(store):
            yield
    except BlockingIOError as error:
        raise DataError(f"another process is collecting features into {str(store)!r}") from error
    except PlaceError:
        raise
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = getattr(cause, "strerror", None) or error
        if getattr(cause, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PlaceError(
                f"nothing can be written into {str(store)!r}: {reason}. Name another folder, or ask for the right to "
                "write there"
            ) from error
        raise StorageError(
            f"cannot write the feature store {str(store)!r}: {reason}. What was collected so far is kept; when "
            "there is room, the same call goes on after it"
        ) from error
