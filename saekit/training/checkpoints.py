"""Checkpoints on disk: everything that a session needs to go on, whole or not at all.

``checkpoints/step-N/`` holds a loadable SAE folder and a training state for each SAE, the state of the batches, and
``checkpoint.json`` with the checksums of every file and of itself.  A folder with SAEs alone is one to look at, nothing
to go on from.  To see what can be gone on from needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.errors import StorageError
from saekit.storage import new_folder, remove_folder, sha256

if TYPE_CHECKING:
    from saekit.sae.module import SAE

__all__ = [
    "Checkpoint",
    "all_checkpoints",
    "keep_saes",
    "newest_checkpoint",
    "set_aside",
    "versions",
    "write_checkpoint",
    "write_saes",
]

MANIFEST, STREAM, TRAINING = "checkpoint.json", "stream", "training"
FORMAT = 1


class OtherFormatError(StorageError):
    """A checkpoint that is not damaged, but of another saekit."""


@attrs.frozen
class Checkpoint:
    """A checkpoint on disk, whose manifest was read."""

    folder: Path
    facts: Mapping[str, Any]
    """Its manifest: ``batches``, ``finished``, ``spaced``, ``identity``, ``versions``, and ``saes`` by name."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest of ``path``; :class:`StorageError` when that cannot be done."""
        try:
            facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise OtherFormatError(
                    f"{path} has format {facts['format']!r}, and this saekit reads {FORMAT}: update saekit to go on"
                )
            if facts["sha256"] != _seal(facts):
                raise StorageError(f"{path / MANIFEST} is damaged: it is not as it was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path / MANIFEST} cannot be read: {type(error).__name__} {error}") from error
        return cls(path, facts)

    @property
    def healthy(self) -> list[str]:
        """The SAEs in it; one that had diverged is not."""
        return [name for name, about in self.facts["saes"].items() if about["diverged"] is None]

    def verify(self) -> None:
        """Compare every file with its checksum; :class:`StorageError` names one that differs."""
        for name, expected in self.facts["files"].items():
            path = self.folder / name
            try:
                found = sha256(path)
            except OSError as error:
                raise StorageError(f"{path} cannot be read: {error.strerror}") from error
            if found != expected:
                raise StorageError(f"{path} is damaged: its sha256 is {found[:12]}..., expected {expected[:12]}...")

    def stream(self) -> dict[str, Any]:
        """The state of the batches and of the process."""
        from saekit.training.state_files import read_state

        return read_state(self.folder, STREAM)

    def training(self, name: str) -> dict[str, Any]:
        """The training state of one SAE."""
        from safetensors.torch import load_file

        from saekit.sae.folder import WEIGHTS
        from saekit.training.state_files import read_state

        state = read_state(self.folder / name, TRAINING)
        if "weights" not in state and state["diverged"] is None:  # they are those of the SAE's own folder
            state["weights"] = load_file(self.folder / name / WEIGHTS)
        return state


def write_saes(folder: Path, saes: Mapping[str, SAE]) -> None:
    """Write ``folder`` as one to look at: an SAE folder for each name."""
    from saekit.sae.folder import write_sae

    with new_folder(folder) as temporary:
        for name, sae in saes.items():
            (temporary / name).mkdir()
            write_sae(sae, temporary / name)


def write_checkpoint(
    folder: Path,
    saes: Mapping[str, SAE],
    states: Mapping[str, Mapping[str, Any]],
    stream: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write ``folder``: the ``saes`` by name, every training state, the ``stream`` state, and the ``facts``.

    A training state without weights has those of the SAE as it is saved.
    """
    from saekit.sae.folder import write_sae
    from saekit.training.state_files import write_state

    with new_folder(folder) as temporary:
        sums = write_state(temporary, STREAM, stream)
        for name, state in states.items():
            (temporary / name).mkdir()
            written = write_state(temporary / name, TRAINING, state)
            if (sae := saes.get(name)) is not None:
                written |= write_sae(sae, temporary / name)
            sums |= {f"{name}/{file}": summed for file, summed in written.items()}
        manifest = {"format": FORMAT, **facts, "files": dict(sorted(sums.items()))}
        manifest["sha256"] = _seal(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of everything else in a manifest."""
    table = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def all_checkpoints(run: Path) -> Iterator[Path]:
    """The folders of ``run`` that are checkpoints to go on from, or were before they were damaged, the newest first."""
    found = [
        (int(match.group(1)), path)
        for path in (run / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
        and any((path / name).exists() for name in (MANIFEST, f"{STREAM}.json", f"{STREAM}.safetensors"))
    ]
    return (path for _, path in sorted(found, reverse=True))


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of ``run`` that is whole; each newer one that is not is warned about.

    :class:`StorageError` when there is none.
    """
    damaged = []
    for path in all_checkpoints(run):
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
        except OtherFormatError:
            raise  # an older one would lose steps that are there
        except StorageError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            warnings.warn(
                f"a newer checkpoint is not used: {problem}. Going on from {path.name} instead",
                RuntimeWarning,
                stacklevel=3,
            )
        return checkpoint
    if damaged:
        raise StorageError(f"every checkpoint in {run / 'checkpoints'} is damaged: {'; '.join(damaged)}")
    raise StorageError(
        f"there is no checkpoint to go on from in {run / 'checkpoints'}: the run was stopped before its first one, or "
        "had checkpoints.keep_last = 0"
    )


def keep_saes(folder: Path, names: Collection[str]) -> None:
    """Make a checkpoint one to look at: only the SAE folders of ``names`` stay, and of those only what loads.

    It is the one or the other at every moment; :class:`StorageError` when it stays as it was.
    """
    if not names:
        remove_folder(folder)
        return
    with new_folder(folder) as temporary:
        for name in names:
            training = shutil.ignore_patterns(f"{TRAINING}.*")
            shutil.copytree(folder / name, temporary / name, ignore=training, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def set_aside(run: Path, newest: Checkpoint) -> None:
    """Give checkpoints that are newer than the ``newest`` whole one another name, so that none is taken for one."""
    for path in all_checkpoints(run):
        if path == newest.folder:
            return
        aside = path.with_name(f"{path.name}.damaged")
        try:
            if aside.exists():
                remove_folder(aside)
            path.rename(aside)
        except OSError as error:
            raise StorageError(f"cannot rename {path}, which is damaged: {error.strerror}") from error


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    import torch

    from saekit import __version__

    return {"saekit": __version__, "torch": torch.__version__}
