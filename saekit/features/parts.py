"""What is collected so far, on disk: parts that are there whole or not at all, and from which a pass goes on.

They lie in the store's folder, in ``collecting``::

    collecting/
        progress.json             what is collected, how far it is, and the checksums of the parts
        part-00000/               0.safetensors, 1.safetensors ...: activations of each SAE on some contexts
        part-00001/               sums.safetensors: the sums of all that is there, in the last one only
        whole/                    the finished files, until they are moved to their places
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import attrs
from torch import Tensor

from saekit.errors import DataError, StorageError
from saekit.features.manifest import FORMAT, differences, sealed
from saekit.features.place import COLLECTING, PROGRESS, another, is_part, sealed_table
from saekit.files.storage import new_folder, sha256, tidy, write_text
from saekit.files.tensors import save_tensors

__all__ = ["Parts"]

SUMS = "sums.safetensors"
_BEGIN = "Begin anew with overwrite=True (saekit features --overwrite)"


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
    def opened(cls, store: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> Self:
        """Those that are there, or none yet.

        :class:`DataError` for those of something else, and for damaged ones, in whose place ``overwrite`` begins anew.
        """
        folder = store / COLLECTING
        try:
            found = cls._there(store, identity)
        except DataError:
            if not overwrite:
                raise
            found = None
        if found is None:
            found = cls(folder, identity)
            found.remove()
            folder.mkdir(parents=True, exist_ok=True)
            found._save()
        return found

    @classmethod
    def _there(cls, store: Path, identity: Mapping[str, Any]) -> Self | None:
        folder = store / COLLECTING
        if not (folder / PROGRESS).exists():
            return None
        table = sealed_table(folder / PROGRESS)
        if table is None or table.get("format") != FORMAT:
            raise DataError(
                f"{folder / PROGRESS} is damaged, was changed after it was written, or is of another version of "
                f"saekit. {_BEGIN}"
            )
        if lines := [*differences(table["identity"], identity)]:
            raise DataError(another(store, lines, begun=True))
        found = cls(folder, identity, list(table["parts"]), int(table["contexts"]), dict(table["files"]))
        found._check()
        return found

    @classmethod
    def forget(cls, store: Path, identity: Mapping[str, Any]) -> None:
        """Remove what a pass of ``identity``, which was ended after it had finished its store, has left."""
        table = sealed_table(store / COLLECTING / PROGRESS)
        if table is not None and table.get("identity") == identity:
            with suppress(OSError, StorageError):
                cls(store / COLLECTING, identity).remove()
        elif table is None:
            with suppress(OSError):  # where there is more than nothing
                (store / COLLECTING).rmdir()

    def _check(self) -> None:
        """Whether all parts are there as they were written; what was not finished goes."""
        listed = {name.partition("/")[0] for name in self.files}
        in_order = self.names == [_part(number) for number in range(len(self.names))]
        if not in_order or listed != set(self.names) or bool(self.names) != (self.contexts > 0):
            raise DataError(f"{self.folder / PROGRESS} names parts that are not those of its contexts. {_BEGIN}")
        for name, entry in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                what = "is not what was written" if path.exists() else "is missing"
                raise DataError(f"what was collected so far cannot be gone on with: {path} {what}. {_BEGIN}")
        self._remove_parts(self.names)

    def _remove_parts(self, but: Sequence[str] = ()) -> None:
        for path in [path for path in self.folder.iterdir() if is_part(path.name) and path.name not in but]:
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        tidy(self.folder, lambda name: name == PROGRESS or is_part(name))

    def remove(self) -> None:
        """Remove all that a pass writes here, and nothing else.  Raises :class:`OSError`."""
        if not self.folder.is_dir():
            return
        self._remove_parts()
        (self.folder / PROGRESS).unlink(missing_ok=True)
        with suppress(OSError):  # where somebody has put something else into it
            self.folder.rmdir()

    def add(self, rows: Sequence[Mapping[str, Tensor]], sums: Mapping[str, Tensor], contexts: int) -> None:
        """A further part, after which ``contexts`` are done."""
        name = _part(len(self.names))
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
        table = {"format": FORMAT, "identity": self.identity, "parts": self.names, "contexts": self.contexts}
        write_text(self.folder / PROGRESS, json.dumps(sealed({**table, "files": self.files}), indent=1) + "\n")

    def remove_if_empty(self) -> None:
        """Leave nothing of what never began."""
        if not self.names:
            with suppress(OSError, StorageError):
                self.remove()
                self.folder.parent.rmdir()

    def rows_of(self, number: int) -> list[Path]:
        """The files of an SAE, in the order of the text."""
        return [self.folder / name / f"{number}.safetensors" for name in self.names]

    @property
    def sums(self) -> Path | None:
        """The sums of all that is there."""
        return self.folder / self.names[-1] / SUMS if self.names else None


def _part(number: int) -> str:
    return f"part-{number:05d}"
