"""When a session is saved."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import attrs
import torch

from saekit.cautions import warn
from saekit.distributed.agreement import done_by_all, leaving
from saekit.distributed.group import Group
from saekit.errors import LostProcessError, StorageError
from saekit.files.paths import here, steady
from saekit.runs.checkpoints import all_checkpoints, mark_finished, write_checkpoint, write_saes
from saekit.runs.folder import RunFolderLostError, Standing
from saekit.runs.interruption import Interruption
from saekit.runs.keeping import Keeping, opened
from saekit.runs.record import RunRecord
from saekit.runs.session import Session
from saekit.runs.spread_checkpoints import write_together
from saekit.runs.staging import Staging, facts_of
from saekit.runs.trackers import Trackers, settle_all
from saekit.runs.waiting import Record, waiting_state
from saekit.runs.writing import Writing
from saekit.sae.folder import Contents
from saekit.training.elsewhere import check_all
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["Saving"]

_SECONDS_FOR_TRACKERS = 5.0  # to take what they were given; what they have not taken then is in the checkpoint
_NOT_NOW = (StorageError, RuntimeError, MemoryError)  # a full disk, or a full memory
_KINDS = (RunFolderLostError, StorageError)
"""What ends the saving of several processes, which is one of these in all."""
_T = TypeVar("_T")


@attrs.frozen
class _Now:
    """What is being written."""

    path: Path
    resumable: bool
    batches: int
    finished: bool
    warnings: list[str]
    """What is to be said when it is done."""
    writing: Writing


class Saving:
    """Saves the session at even distances, by the clock, and when it is asked to; an observer of the loop.

    What is saved is copied in the loop and written by a thread, behind it; the loop waits only where something is being
    written already.  It is also where a signal that came during a step takes effect.
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
        self._now: _Now | None = None  # what is being written
        self._saved: Path | None = None
        self._resumable = self._noted = False
        self.broken_off = False
        """A save was interrupted."""
        self.failed = False
        """One of several processes could not write its part, which ends all."""
        self._keeping = Keeping(folder, trackers.values(), self._options.keep_last)

    @property
    def _folder(self) -> Path:
        """The run folder, wherever the process has gone since."""
        return steady(self._given, self._given_in)

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        pass

    def after_batch(self) -> None:
        self._look(wait=False)
        before, self._session.told = self._session.told, self._session.tokens
        tokens = self._session.told
        spaced = self._marks(tokens) > self._marks(before) and tokens < self._session.total_tokens
        minutes = (time.monotonic() - self._saved_at) / 60
        due = spaced or (self._options.keep_last > 0 and 0 < self._options.every_minutes <= minutes)
        due, signal, failed = self._agreed(due)
        if failed:
            self.settle()
        if due:
            self.save_if_possible(spaced=spaced)
        self._stop(signal if self._several else self._interruption.asked)

    def _agreed(self, due: bool) -> tuple[bool, int, bool]:
        """What holds in one process, and so in all: that it is time to save, as the first finds; which signal has come,
        if any; that something could not be written."""
        world = self._session.world
        if world.size == 1:
            return due, self._interruption.asked, False
        failed = self._now is not None and self._now.writing.done and self._now.writing.error is not None
        mine = torch.tensor([int(due and world.main), self._interruption.asked, int(failed)])
        agreed, signal, failures = (int(most) for most in torch.stack(world.all.gather(mine)).amax(0))
        return bool(agreed), signal, bool(failures)

    def stop_if_asked(self) -> None:
        """:class:`KeyboardInterrupt` where a signal has come, in all processes if to one; all must ask."""
        signals = self._session.world.all.objects(self._interruption.asked)
        self._stop(max(signals))

    def _stop(self, signal: int) -> None:
        """:class:`KeyboardInterrupt` in all processes, for a ``signal`` that all know to have come to one of them.

        One that has come since then counts when all are asked again.
        """
        if not signal:
            return
        self._interruption.hand_on(signal)
        try:
            self._interruption.raise_if_asked()
        except KeyboardInterrupt as stop:
            leaving(stop, self._session.world.all)
            raise

    def _marks(self, tokens: int) -> int:
        """How many of the evenly spaced marks lie at or before ``tokens``."""
        return tokens * (self._options.n_checkpoints + 1) // self._session.total_tokens

    def save_if_possible(self, *, spaced: bool = False, finished: bool = False) -> None:
        """Begin to save, or warn that it is not possible; what was saved before is still there then.

        What is said of a warning comes with the next batch, or with whatever else is asked of this, if it is only found
        out while writing.  When all is ``finished``, nothing is left to be written when this returns.
        """
        self.settle()
        if finished and not self._options.keep_last:
            return  # the SAEs are where they belong by now
        self._saved_at = time.monotonic()
        batches = self._session.batches
        try:
            self._noticed(lambda: self._begin(spaced, finished))
        except RunFolderLostError:
            raise  # from here on, everything would be lost
        except _NOT_NOW as error:
            if self._several:
                self.failed = True
                raise
            self._tell(error, batches, finished=finished)
        if finished:
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written any more, and say what became of it; all processes must ask."""
        try:
            done_by_all(self._session.world.all, lambda: self._look(wait=True), kinds=_KINDS)
        except RunFolderLostError:
            raise
        except _NOT_NOW:
            self.failed = self._several
            raise

    @property
    def _several(self) -> bool:
        return self._session.world.size > 1

    def end(self) -> None:
        """Wait until nothing is being written any more, whatever became of it; a Ctrl-C ends that."""
        if self._now is not None:
            self._noticed(self._now.writing.wait)

    def _look(self, *, wait: bool) -> None:
        """Say what became of what was being written, if it has ended; RunFolderLostError is raised.

        So is whatever it was in one of several processes, when all ``wait`` for it.
        """
        now = self._now
        if now is None or not (wait or now.writing.done):
            return
        if not wait and self._several and now.writing.error is not None:
            return
        self._noticed(now.writing.wait)
        self._now = None
        self._warn(now)
        kept = isinstance(now.writing.error, _NOT_NOW) and not isinstance(now.writing.error, RunFolderLostError)
        if kept and not self._several:
            assert now.writing.error is not None
            self._tell(now.writing.error, now.batches, finished=now.finished)
        elif now.writing.error is not None:
            raise now.writing.error
        else:
            self._saved, self._resumable = now.path, now.resumable

    def _warn(self, now: _Now) -> None:
        for text in now.warnings:
            warn(text, RuntimeWarning)

    def _tell(self, error: BaseException, batches: int, *, finished: bool) -> None:
        kept = next(all_checkpoints(self._folder), None)
        warn(
            f"there is no checkpoint after {batches:,} step{'s' * (batches != 1)}: {error}. "
            f"{'The SAEs are saved all the same' if finished else 'Training goes on'}; the last checkpoint is "
            f"{kept or 'still to come'}",
            RuntimeWarning,
        )

    def _noticed(self, work: Callable[[], _T]) -> _T:
        """A Ctrl-C while ``work`` lasts breaks a save off, and nothing is being written when it is raised."""
        try:
            return work()
        except KeyboardInterrupt:
            self.broken_off = True
            now, self._now = self._now, None
            if now is not None:
                now.writing.give_up()
            raise

    def finish(self) -> None:
        """Say in the last checkpoint that the run is finished; from then on it is not gone on with."""
        self.settle()
        self.check_folder()
        if not self._session.world.main or self._saved is None or not self._resumable:
            return
        try:
            mark_finished(self._folder / "checkpoints" / self._saved.name)
        except StorageError as error:
            warn(f"{self._saved} does not say that the run is finished: {error}", RuntimeWarning)

    def save(self, enough: float = math.inf) -> Path | None:
        """Write a checkpoint of every SAE that is worth one, remove those that are too old, and return its folder.

        In the middle of a step, or with ``checkpoints.keep_last = 0``, the SAEs alone are saved.  None: all diverged.
        What cannot be written is raised.  One that is being written will do if that takes ``enough`` more seconds: to
        train its steps again takes no longer than to write another.
        """
        before, begun = self._now, time.monotonic()
        self.settle()
        slow = before is not None and self._saved == before.path and time.monotonic() - begun >= enough
        if self._session.world.all.once(lambda: slow and self._resumable):
            return self._saved
        path = self._noticed(lambda: self._begin(spaced=False, finished=False))
        if (now := self._now) is not None:
            self._noticed(now.writing.wait)
            self._now = None
            self._warn(now)
            if now.writing.error is not None:
                raise now.writing.error
            self._saved, self._resumable = now.path, now.resumable
        return path

    def check_folder(self) -> None:
        """:class:`RunFolderLostError` when the run folder is not the one any more that it was; all processes must ask.

        The first of them sees it.
        """
        self._check_standing(self._session.world.all)

    def _check_standing(self, group: Group) -> None:
        if self._standing is not None:
            done_by_all(group, self._standing.check, kinds=_KINDS)

    def save_in(self, folder: Path) -> Path | None:
        """:meth:`save` in another run folder, since the run's own is lost."""
        self._given, self._given_in, self._standing = folder, here(), None
        self._saved, self._noted = None, False
        return self.save()

    def _begin(self, spaced: bool, finished: bool) -> Path | None:
        """Copy what is to be saved, and begin to write it; nothing else is being written.

        Returns where it is, or will be.
        """
        self.check_folder()
        session = self._session
        settle_all(self._trackers.values(), _SECONDS_FOR_TRACKERS)
        path = self._folder / "checkpoints" / f"step-{session.batches}"
        resumable = session.between_steps and self._options.keep_last > 0
        worth = self._worth_saving()
        just_now = self._saved is not None and path.name == self._saved.name and not finished  # for another reason
        # Of several processes, the first decides: the others may see the disk later, or not know what failed.
        there, was_spaced, just_now = session.world.all.once(lambda: (*_seen(path), just_now))
        if not worth or (there and not resumable):
            return path if there else None
        if just_now:
            return path
        staging = Staging(changes=not finished)
        spaced = spaced or was_spaced
        write, arrived = done_by_all(
            session.world.all, lambda: self._staged(path, worth, staging, resumable=resumable, spaced=spaced)
        )
        behind = session.world.behind
        diverged = self._diverged()
        warned: list[str] = []
        folder, main = self._folder.absolute(), session.world.main

        def work(writing: Writing) -> None:
            done_by_all(behind, arrived)
            self._check_standing(behind)
            try:
                write(writing.go_on)
            except LostProcessError:
                raise
            except BaseException:
                self._check_standing(behind)  # if it is lost, that is what is wrong
                raise
            self._check_standing(behind)
            self._keeping.note(worth, path)
            if not main:
                return
            if resumable:
                self._note_checkpoint(folder)
            writing.is_there()
            self._keeping.remove_old(folder, diverged, warned.append)

        self._now = now = _Now(path, resumable, session.batches, finished, warned, Writing(work))
        now.writing.begin()
        for name in worth:
            step = session.members[name].trainer.step
            self._trackers[name].log_checkpoint(path.absolute() / name, step, now.writing.there)
        return path

    def _staged(
        self, path: Path, worth: Mapping[str, SAETrainer], staging: Staging, *, resumable: bool, spaced: bool
    ) -> tuple[Callable[[Callable[[], None]], None], Callable[[], None]]:
        """Copy what is to be saved: what writes it, and what waits for the copies.

        ``spaced``: for that reason, perhaps beside another.
        """
        session, place = self._session, path.absolute()
        world, column = session.world, session.world.column
        own = {name: trainer for name, trainer in worth.items() if session.members[name].here}
        saes = staging.saes(own)
        whole = {name: one for name, one in saes.items() if isinstance(one, Contents)}  # of one process, all
        if not resumable:
            if world.size == 1:
                return functools.partial(write_saes, place, whole), staging.arrived()
            return functools.partial(write_together, world.behind, place, saes, {}, None, None), staging.arrived()
        trainings, facts = staging.trainings(session), facts_of(session, spaced=spaced)
        state = self._stream(path, worth, staging) if world.saes.rank == 0 else None  # others have the same
        stream = None if state is None else staging.stream(state, column, session.lanes)
        if stream is not None and world.size == 1:
            return functools.partial(write_checkpoint, place, whole, trainings, stream, facts), staging.arrived()
        write = functools.partial(write_together, world.behind, place, saes, trainings, stream, facts)
        return write, staging.arrived()

    def _note_checkpoint(self, folder: Path) -> None:
        """Once there is one, a run without any is not one that was stopped early."""
        if not self._noted:
            with contextlib.suppress(StorageError):  # the checkpoint is there, which is what counts
                RunRecord.note_checkpoint(folder)
            self._noted = True

    def _stream(self, path: Path, saes: Collection[str], staging: Staging) -> dict[str, object]:
        """The state of the batches, and what the trackers have not taken; of the checkpoint itself, none has."""
        waiting = {}
        for name, trackers in self._trackers.items():
            place, step = path.absolute(), self._session.members[name].trainer.step
            saved = Record(step, folder=place / name) if name in saes else None
            waiting[name] = waiting_state(trackers.waiting(saved), place.parent)
        return {**self._session.stream_state(staging.held), "trackers": waiting}

    def _worth_saving(self) -> dict[str, SAETrainer]:
        trainers = {name: member.trainer for name, member in self._session.members.items()}
        check_all(self._session.world.saes, trainers.values())
        return {name: trainer for name, trainer in trainers.items() if trainer.diverged is None}

    def _diverged(self) -> list[str]:
        return [name for name, member in self._session.members.items() if member.trainer.diverged is not None]

    def last_good(self, name: str) -> Path | None:
        """The newest folder of an SAE that was saved before it diverged."""
        self.settle()
        path = self._keeping.last_good.get(name)
        return None if path is None else self._folder / "checkpoints" / path.name / name


def _seen(path: Path) -> tuple[bool, bool]:
    """Whether a checkpoint is there, and at an even distance."""
    checkpoint = opened(path) if path.exists() else None
    return path.exists(), checkpoint is not None and bool(checkpoint.facts["spaced"])
