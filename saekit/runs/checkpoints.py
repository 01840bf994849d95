"""Checkpoints on disk: everything that a session needs to go on, whole or not at all.

``checkpoints/step-N/`` holds a loadable SAE folder and a training state for each SAE, the state of the batches, and
``checkpoint.json`` with the checksums of every file and of itself.  A folder with SAEs alone is one to look at, nothing
to go on from.  To see what can be gone on from needs no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from saekit.cautions import warn
from saekit.errors import PlaceError, SaekitError, StorageError
from saekit.files.names import SAE_FILES, SAE_WEIGHTS, half_written
from saekit.files.storage import leads_out, new_folder, nothing, read_json, remove_folder, sha256, write_text
from saekit.runs.facts import check_facts, check_stream, check_training

if TYPE_CHECKING:
    from saekit.runs.state_files import StateFiles
    from saekit.sae.folder import Contents

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "all_checkpoints",
    "carry_over",
    "check_place",
    "finish_checkpoint",
    "is_checkpoint_name",
    "keep_saes",
    "mark_finished",
    "newest_checkpoint",
    "set_aside",
    "versions",
    "write_checkpoint",
    "write_saes",
]

MANIFEST, STREAM, TRAINING, MOMENTS = "checkpoint.json", "stream", "training", "moments"
FORMAT = 2
"""Since what the optimizer keeps may lie in files of several processes; without such files, it is 1."""
_OWN = re.compile(rf"{re.escape(MANIFEST)}|{STREAM}(-\d+)?\.(json|safetensors)", re.ASCII)
_STATES = rf"({TRAINING}(-\d+)?|{MOMENTS}-\d+-\d+)\.(json|safetensors)"
_OWN_OF_SAE = re.compile(rf"{_STATES}|{'|'.join(map(re.escape, SAE_FILES))}", re.ASCII)
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of systems, which nobody misses


class OtherFormatError(PlaceError):
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
            facts = read_json(path / MANIFEST)
            if isinstance(facts["format"], int) and facts["format"] > FORMAT:
                raise OtherFormatError(
                    f"{path} has format {facts['format']!r}, and this saekit reads {FORMAT}: update saekit to go on"
                )
            if facts["format"] not in (1, FORMAT) or facts["sha256"] != _seal(facts):
                raise StorageError(f"{path / MANIFEST} is damaged: it is not as it was written")
            check_facts(facts)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
                found = sha256(path) if not leads_out(path, self.folder) else "that of another file, by a link"
            except OSError as error:
                raise StorageError(f"{path} cannot be read: {error.strerror}") from error
            if found != expected:
                raise StorageError(f"{path} is damaged: its sha256 is {found[:12]}..., expected {expected[:12]}...")

    @property
    def mesh(self) -> tuple[int, int]:
        """Over how many processes batches and features were split when it was written."""
        data, features = self.facts.get("mesh", (1, 1))
        return data, features

    @property
    def processes(self) -> int:
        """How many wrote it."""
        return self.mesh[0] * self.mesh[1]

    def streams(self) -> list[dict[str, Any]]:
        """The state of each process, whose tensors show its file."""
        return [self.stream(process, mapped=True) for process in range(self.processes)]

    def stream(self, process: int = 0, *, mapped: bool = False) -> dict[str, Any]:
        """The state of the batches and of the process of this number."""
        stem = STREAM if self.mesh == (1, 1) else f"{STREAM}-{process}"
        state = self._read(self.folder, stem, mapped=mapped)
        self._checked(stem, lambda: check_stream(state, self.facts))
        return state

    def training(self, name: str, part: int | None = None, *, mapped: bool = False) -> dict[str, Any]:
        """The training state of one SAE; of several processes, of this ``part`` of its features.

        ``mapped``: its tensors show their files.
        """
        from safetensors import SafetensorError

        from saekit.runs.state_files import read_tensors

        state = self._read(self.folder / name, TRAINING if part is None else f"{TRAINING}-{part}", mapped=mapped)
        self._checked(f"{name}/{TRAINING}", lambda: check_training(state, self.facts["saes"][name], name))
        if "weights" not in state and state["diverged"] is None:  # they are those of the SAE's own folder
            path = self.folder / name / SAE_WEIGHTS
            try:
                state["weights"] = read_tensors(path, mapped=True)
            except (OSError, SafetensorError) as error:
                raise StorageError(f"{path} cannot be read: {error}") from error
        return state

    def moments(self, name: str, part: int | None = None, *, mapped: bool = False) -> list[dict[str, Any]]:
        """What other processes with the same features kept of the optimizer, in their order, and so wrote: of what is
        in :meth:`training`, the parts that come after it."""
        stems = [f"{MOMENTS}-{part}-{process}" for process in range(1, self.mesh[0])]
        there = [stem for stem in stems if f"{name}/{stem}.json" in self.facts["files"]]
        if there and there != stems:
            lacking = ", ".join(f"{name}/{stem}.json" for stem in stems if stem not in there)
            raise StorageError(f"{self.folder} is damaged: it lacks {lacking}, a part of what the optimizer keeps")
        return [self._read(self.folder / name, stem, mapped=mapped)["optimizer"] for stem in there]

    def _read(self, folder: Path, stem: str, *, mapped: bool = False) -> dict[str, Any]:
        from saekit.runs.state_files import read_state

        state = read_state(folder, stem, mapped=mapped)
        if not isinstance(state, dict):
            raise StorageError(f"{stem} in {folder} holds no state")
        return state

    def _checked(self, what: str, check: Callable[[], None]) -> None:
        try:
            check()
        except ValueError as error:
            raise StorageError(f"{what} in {self.folder} is damaged: {error}") from error


def write_saes(folder: Path, saes: Mapping[str, Contents], go_on: Callable[[], None] = nothing) -> None:
    """Write ``folder`` as one to look at: an SAE folder for each name.

    ``go_on`` is called from time to time; what it raises ends this, and nothing is there then.
    """
    check_place(folder)
    with new_folder(folder, go_on=go_on) as temporary:
        for name, sae in saes.items():
            (temporary / name).mkdir()
            sae.write(temporary / name, go_on)
        carry_over(folder, temporary)


def write_checkpoint(
    folder: Path,
    saes: Mapping[str, Contents],
    states: Mapping[str, StateFiles],
    stream: StateFiles,
    facts: Mapping[str, Any],
    go_on: Callable[[], None] = nothing,
) -> None:
    """Write ``folder``: the ``saes`` by name, every training state, the ``stream`` state, and the ``facts``.

    A training state without weights has those of the SAE as it is saved.  ``go_on`` is called from time to time; what
    it raises ends this, and what was there before is there still.
    """
    check_place(folder)
    with new_folder(folder, go_on=go_on) as temporary:
        sums = stream.write(temporary, go_on)
        for name, state in states.items():
            (temporary / name).mkdir()
            written = state.write(temporary / name, go_on)
            if (sae := saes.get(name)) is not None:
                written |= sae.write(temporary / name, go_on)
            sums |= {f"{name}/{file}": summed for file, summed in written.items()}
        finish_checkpoint(folder, temporary, facts, sums)


def finish_checkpoint(folder: Path, temporary: Path, facts: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Write the manifest of the checkpoint ``folder`` into ``temporary``, which has its files and becomes it."""
    divided = any(f"/{MOMENTS}-" in file for file in sums)
    manifest = {"format": FORMAT if divided else 1, **facts, "files": dict(sorted(sums.items()))}
    carry_over(folder, temporary)
    (temporary / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8", newline="\n")


def check_place(folder: Path) -> None:
    """:class:`StorageError` when something lies where a checkpoint is to be that is no folder, so not saekit's."""
    for place in (folder.parent, folder):
        if os.path.lexists(place) and (not place.is_dir() or (place == folder and place.is_symlink())):
            raise StorageError(
                f"{place} is not a folder of saekit's, and is left alone; move it away, to make room for checkpoints"
            )


def mark_finished(folder: Path) -> None:
    """Say in the checkpoint ``folder`` that there is nothing left to do for its run."""
    facts = {**Checkpoint.open(folder).facts, "finished": True}
    write_text(folder / MANIFEST, _manifest_text(facts))


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"


def _seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of everything else in a manifest."""
    table = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint may be called so."""
    return re.fullmatch(r"step-\d{1,18}(\.damaged(-\d+)?)?", name, re.ASCII) is not None


def all_checkpoints(run: Path) -> Iterator[Path]:
    """The folders of ``run`` that are checkpoints to go on from, or were before they were damaged, the newest first."""
    found = [
        (int(match.group(1)), path)
        for path in (run / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d{1,18})", path.name, re.ASCII))
        and any(_OWN.fullmatch(file.name) for file in path.glob("*"))
    ]
    return (path for _, path in sorted(found, reverse=True))


def newest_checkpoint(
    run: Path, unusable: Mapping[Path, str] | None = None, check: Callable[[Checkpoint], object] = lambda _: None
) -> Checkpoint:
    """The newest checkpoint of ``run`` that is whole; each newer one that is not is warned about.

    ``unusable`` says which are known not to be, and why, and ``check`` raises :class:`SaekitError` for another such.

    :class:`StorageError` when there is none.
    """
    damaged = []
    for path in all_checkpoints(run):
        try:
            if known := (unusable or {}).get(path):
                raise StorageError(known)
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            check(checkpoint)
        except OtherFormatError:
            raise  # an older one would lose steps that are there
        except SaekitError as error:
            damaged.append(str(error))
            continue
        for problem in damaged:
            warn(
                f"a newer checkpoint is not used: {problem}. Going on from {path.name} instead",
                RuntimeWarning,
            )
        return checkpoint
    if damaged:
        raise PlaceError(f"every checkpoint in {run / 'checkpoints'} is damaged: {'; '.join(damaged)}")
    raise PlaceError(
        f"there is no checkpoint to go on from in {run / 'checkpoints'}: the run was stopped before its first one, or "
        "had checkpoints.keep_last=0"
    )


def keep_saes(folder: Path, names: Collection[str]) -> None:
    """Make a checkpoint one to look at: only the SAE folders of ``names`` stay, and of those only what loads.

    Files that are not saekit's stay, too.  It is the one or the other at every moment; :class:`StorageError` when it
    stays as it was.
    """
    if not names and not _strangers(folder):
        remove_folder(folder)
        return
    with new_folder(folder) as temporary:
        for name in names:
            (temporary / name).mkdir()
            for file in SAE_FILES:
                if (folder / name / file).exists():
                    _link(folder / name / file, temporary / name / file)
        carry_over(folder, temporary)


def _strangers(folder: Path) -> list[Path]:
    """The files in a checkpoint that somebody else has put there."""
    found = []
    for path in folder.rglob("*"):
        depth = len(path.relative_to(folder).parts)
        name, _ = half_written(path.name) or (path.name, "")
        own = depth <= 2 and (_OWN if depth == 1 else _OWN_OF_SAE).fullmatch(name) is not None
        litter = path.name in _LITTER or path.name.startswith(".nfs")
        if not (own or litter or (path.is_dir() and not path.is_symlink())):
            found.append(path)
    return found


def carry_over(folder: Path, to: Path) -> None:
    """Files that are not saekit's do not go with a checkpoint that does."""
    for path in _strangers(folder):
        place = to / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(path, place)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def set_aside(run: Path, newest: Checkpoint) -> None:
    """Give checkpoints that are newer than the ``newest`` whole one another name, so that none is taken for one."""
    for path in all_checkpoints(run):
        if path == newest.folder:
            return
        numbers = itertools.chain([""], map("-{}".format, itertools.count(2)))
        names = (path.with_name(f"{path.name}.damaged{number}") for number in numbers)
        aside = next(name for name in names if not os.path.lexists(name))
        try:
            path.rename(aside)
        except OSError as error:
            raise StorageError(f"cannot rename {path}, which is damaged: {error.strerror}") from error


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    import torch

    from saekit._version import __version__

    return {"saekit": __version__, "torch": torch.__version__}
