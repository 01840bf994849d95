"""When a session is saved, and which of its checkpoints stay."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from saekit.config import TrainConfig
from saekit.config.files import plain_config
from saekit.errors import DivergedError, StorageError
from saekit.files.paths import here, steady
from saekit.runs.checkpoints import (
    Checkpoint,
    all_checkpoints,
    keep_saes,
    mark_finished,
    versions,
    write_checkpoint,
    write_saes,
)
from saekit.runs.folder import RunFolderLostError, Standing
from saekit.runs.interruption import Interruption
from saekit.runs.record import RunRecord
from saekit.runs.session import Session
from saekit.runs.trackers import Trackers, settle_all
from saekit.runs.waiting import Record, waiting_state
from saekit.sae.module import SAEModule
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["Saving"]

_KEPT_FOR_TRACKERS = 8
"""So many old checkpoints are kept for trackers that have still to read them, beside those that are being read."""
_SECONDS_FOR_TRACKERS = 5.0  # to take what they were given; what they have not taken then is in the checkpoint


class Saving:
    """Saves the session at even distances, by the clock, and when it is asked to; an observer of the loop.

    It is also where a signal that came during a step takes effect.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        trackers: Mapping[str, Trackers],
        interruption: Interruption,
        standing: Standing | None = None,
    ) -> None:
        """``standing`` watches ``folder``."""
        self._session, self._trackers = session, trackers
        self._given, self._given_in = folder, here()
        self._interruption, self._standing = interruption, standing
        self._options = next(iter(session.members.values())).config.checkpoints
        self._saved_at = time.monotonic()
        self._saved: Path | None = None
        self._resumable = self._noted = self._told_of_lag = False
        self.broken_off = False
        """A save was interrupted."""
        self._last_good: dict[str, Path] = {}  # of each SAE, the newest checkpoint that has it
        for path in reversed(list(all_checkpoints(folder))):
            self._last_good.update(dict.fromkeys(_healthy(path), path))

    @property
    def _folder(self) -> Path:
        """The run folder, wherever the process has gone since."""
        return steady(self._given, self._given_in)

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        pass

    def after_batch(self) -> None:
        before, self._session.told = self._session.told, self._session.tokens
        tokens = self._session.told
        spaced = self._marks(tokens) > self._marks(before) and tokens < self._session.total_tokens
        minutes = (time.monotonic() - self._saved_at) / 60
        if spaced or (self._options.keep_last and 0 < self._options.every_minutes <= minutes):
            self.save_if_possible(spaced=spaced)
        self._interruption.raise_if_asked()

    def _marks(self, tokens: int) -> int:
        """How many of the evenly spaced marks lie at or before ``tokens``."""
        return tokens * (self._options.n_checkpoints + 1) // self._session.total_tokens

    def save_if_possible(self, *, spaced: bool = False, finished: bool = False) -> None:
        """:meth:`save`, or a warning that it was not possible; what was saved before is still there then."""
        if finished and not self._options.keep_last:
            return  # the SAEs are where they belong by now
        try:
            self.save(spaced=spaced, finished=finished)
        except RunFolderLostError:
            raise  # from here on, everything would be lost
        except (StorageError, RuntimeError, MemoryError) as error:  # a full disk, or a full memory
            kept = next(all_checkpoints(self._folder), None)
            warnings.warn(
                f"there is no checkpoint after {self._session.batches:,} steps: {error}. "
                f"{'The SAEs are saved all the same' if finished else 'Training goes on'}; the last checkpoint is "
                f"{kept or 'still to come'}",
                RuntimeWarning,
                stacklevel=4,
            )
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Say in the last checkpoint that the run is finished; from then on it is not gone on with."""
        if self._saved is None or not self._resumable:
            return
        self.check_folder()
        try:
            mark_finished(self._folder / "checkpoints" / self._saved.name)
        except StorageError as error:
            warnings.warn(f"{self._saved} does not say that the run is finished: {error}", RuntimeWarning, stacklevel=4)

    def save(self, *, spaced: bool = False, finished: bool = False) -> Path | None:
        """Write a checkpoint of every SAE that is worth one, remove those that are too old, and return its folder.

        In the middle of a step, or with ``checkpoints.keep_last = 0``, the SAEs alone are saved.  None: all diverged.
        """
        try:
            return self._save(spaced, finished)
        except KeyboardInterrupt:
            self.broken_off = True
            raise

    def check_folder(self) -> None:
        """:class:`RunFolderLostError` when the run folder is not the one any more that it was."""
        if self._standing is not None:
            self._standing.check()

    def save_in(self, folder: Path) -> Path | None:
        """:meth:`save` in another run folder, since the run's own is lost."""
        self._given, self._given_in, self._standing = folder, here(), None
        self._saved, self._noted = None, False
        return self.save()

    def _save(self, spaced: bool, finished: bool) -> Path | None:
        self.check_folder()
        session = self._session
        settle_all(self._trackers.values(), _SECONDS_FOR_TRACKERS)
        path = self._folder / "checkpoints" / f"step-{session.batches}"
        resumable = session.between_steps and self._options.keep_last > 0
        saes = self._worth_saving()
        if not saes or (path.exists() and not resumable):
            return path if path.exists() else None
        if self._saved is not None and path.name == self._saved.name and not finished:  # just now, for another reason
            return path
        if resumable:
            before = _opened(path) if path.exists() else None
            spaced = spaced or (before is not None and before.facts["spaced"])  # for another reason, perhaps both
            states = {name: _state(member.trainer) for name, member in session.members.items()}
            write_checkpoint(path, saes, states, self._stream(path, saes), self._facts(spaced))
            self._note_checkpoint()
        else:
            write_saes(path, saes)
        self._saved, self._resumable = path, resumable
        self._last_good.update(dict.fromkeys(saes, path))
        for name in saes:
            self._trackers[name].log_checkpoint(path.absolute() / name, session.members[name].trainer.step)
        self._remove_old()
        return path

    def _note_checkpoint(self) -> None:
        """Once there is one, a run without any is not one that was stopped early."""
        if not self._noted:
            with contextlib.suppress(StorageError):  # the checkpoint is there, which is what counts
                RunRecord.note_checkpoint(self._folder)
            self._noted = True

    def _stream(self, path: Path, saes: Collection[str]) -> dict[str, object]:
        """The state of the batches, and what the trackers have not taken; of the checkpoint itself, none has."""
        waiting = {}
        for name, trackers in self._trackers.items():
            place, step = path.absolute(), self._session.members[name].trainer.step
            saved = Record(step, folder=place / name) if name in saes else None
            waiting[name] = waiting_state(trackers.waiting(saved), place.parent)
        return {**self._session.stream_state(), "trackers": waiting}

    def _worth_saving(self) -> dict[str, SAEModule]:
        saes = {}
        for name, member in self._session.members.items():
            try:
                if member.trainer.diverged is None:
                    member.trainer.check_weights()
                    saes[name] = member.trainer.raw_sae()
            except DivergedError as error:
                member.trainer.diverged = str(error)
        return saes

    def _facts(self, spaced: bool) -> dict[str, object]:
        about = {
            name: {
                "step": member.trainer.step,
                "tokens": member.trainer.tokens,
                "diverged": member.trainer.diverged,
                "d_sae": member.trainer.d_sae,
                "config": self._config(member.config),
            }
            for name, member in self._session.members.items()
        }
        return {
            "batches": self._session.batches,
            "finished": False,
            "spaced": spaced,
            "saes": about,
            "identity": dict(self._session.identity),
            "versions": versions(),
        }

    def _config(self, config: TrainConfig) -> dict[str, object]:
        """The configuration as plain data, without where the run lies: it may be moved."""
        table = plain_config(config, self._session.plugins)
        for option in ("folder", "name"):
            table["checkpoints"].pop(option)
        return table

    def _remove_old(self) -> None:
        """Of a checkpoint that is too old to go on from, only what somebody may want to look at stays."""
        old = list(all_checkpoints(self._folder))[self._options.keep_last :]
        in_use = [path for path in old if self._in_use(path)]
        for path in in_use[_KEPT_FOR_TRACKERS:]:
            self._forget(path)
        for path in old:
            if self._in_use(path):
                continue  # until the next time
            checkpoint = _opened(path)
            if checkpoint is not None and checkpoint.facts["spaced"]:
                names = checkpoint.healthy
            else:
                names = [name for name in self._diverged() if self._last_good.get(name, Path()).name == path.name]
            try:
                keep_saes(path, names)
            except StorageError as error:
                warnings.warn(f"an old checkpoint stays: {error}", RuntimeWarning, stacklevel=5)

    def _in_use(self, path: Path) -> bool:
        return any(trackers.in_use(path.absolute()) for trackers in self._trackers.values())

    def _forget(self, path: Path) -> None:
        """Trackers that are far behind, or hang, are not told of ``path`` any more."""
        for trackers in self._trackers.values():
            trackers.forget(path.absolute())
        if not self._told_of_lag:
            self._told_of_lag = True
            warnings.warn(
                f"trackers are more than {_KEPT_FOR_TRACKERS} checkpoints behind: they are not told of {path} and "
                "others that are too old, which go",
                RuntimeWarning,
                stacklevel=6,
            )

    def _diverged(self) -> list[str]:
        return [name for name, member in self._session.members.items() if member.trainer.diverged is not None]

    def last_good(self, name: str) -> Path | None:
        """The newest folder of an SAE that was saved before it diverged."""
        path = self._last_good.get(name)
        return None if path is None else self._folder / "checkpoints" / path.name / name


def _state(trainer: SAETrainer) -> dict[str, object]:
    """The training state, without the weights where the SAE as it is saved has the very same."""
    state = trainer.state_dict()
    if trainer.as_saved and trainer.sae.saved_as_it_is and not list(trainer.sae.buffers()):
        state.pop("weights", None)
    return state


def _opened(path: Path) -> Checkpoint | None:
    try:
        return Checkpoint.open(path)
    except StorageError:  # damaged: it is of no use to anybody
        return None


def _healthy(path: Path) -> list[str]:
    checkpoint = _opened(path)
    return checkpoint.healthy if checkpoint is not None else []
