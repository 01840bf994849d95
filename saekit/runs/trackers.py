"""Trackers at work: each in a thread of its own, so that none can stop training or hold it up."""

from __future__ import annotations

import errno
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from saekit.abilities import Concludes, TakesCheckpoints
from saekit.cautions import warn
from saekit.config import TrainConfig
from saekit.config.files import plain_config
from saekit.defaults import ALWAYS_TRACKED
from saekit.errors import PluginError, PluginFailedError, SaekitError, StorageError
from saekit.plugins.manager import PluginManager
from saekit.protocols import Tracker
from saekit.reasons import error_text
from saekit.runs.checks import chosen_trackers
from saekit.runs.tracker_files import TrackerFiles
from saekit.runs.waiting import Record, TrackersState
from saekit.values import Metrics, RunEnd, RunInfo

__all__ = ["Trackers", "close_all", "settle_all", "start_trackers"]

WAITING_AT_MOST = 10_000
"""So many records may wait for a tracker; one more, and it is too slow to be of use."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_AGAIN = 1.0
"""Seconds until a disk that was full is tried again, if there is nothing more to be written before."""


class Trackers:
    """All trackers of one SAE.

    One that fails is reported once, by a warning in the training thread, and left alone from then on; training goes on.
    What it has not taken stays in the run's state, the newest :data:`WAITING_AT_MOST` records.
    """

    def __init__(self, trackers: dict[str, Tracker], waiting: TrackersState | None = None) -> None:
        """``waiting`` is what the trackers of a run before had not taken; it comes first."""
        waiting = waiting or {}
        # One that could not be started: what it has not taken, and what comes, is kept for when it can be.
        self._unstarted = {
            name: deque(records, WAITING_AT_MOST) for name, records in waiting.items() if name not in trackers
        }
        self._workers = [_Worker(name, tracker, waiting.get(name, ())) for name, tracker in trackers.items()]

    @property
    def failed(self) -> dict[str, str]:
        """What became of the trackers that are off, by name."""
        return {worker.name: worker.failure for worker in self._workers if worker.failure is not None}

    def log(self, metrics: Metrics, step: int) -> None:
        """Hand ``metrics`` to every tracker that still works; this never waits."""
        record = Record(step, dict(metrics))  # the caller goes on with its own
        for worker in self._workers:
            worker.hand_over(record)
        for owed in self._unstarted.values():
            owed.append(record)
        self._report()

    def log_checkpoint(self, folder: Path, step: int, there: Callable[[], bool] | None = None) -> None:
        """Tell the trackers that care of a saved SAE; this never waits, so see :meth:`in_use`.

        One that is still being written they are told of when it is ``there``, in its turn, or never.
        """
        for worker in self._workers:
            if worker.cares_of_saes:
                worker.hand_over(Record(step, folder=folder, there=there))
        self._report()

    def waiting(self, saved: Record | None = None) -> TrackersState:
        """What each tracker has not taken, one that failed or could not be started included.

        Taken is what its method has returned from.  ``saved`` is a record of an SAE that those who care will be handed
        next.
        """
        found = {name: list(owed) for name, owed in self._unstarted.items()}
        for worker in self._workers:
            more = [saved] if saved is not None and worker.cares_of_saes and worker.works else []
            found[worker.name] = [*worker.waiting(), *more]
        return found

    def in_use(self, folder: Path) -> bool:
        """Whether a tracker has still to read a saved SAE that is ``folder`` or lies in it: then keep it for now."""
        return any(worker.needs(folder) for worker in self._workers)

    def forget(self, folder: Path) -> None:
        """Tell no tracker any more of a saved SAE that is ``folder`` or lies in it; one may be reading it by now."""
        for worker in self._workers:
            worker.forget(folder)

    def flush(self, timeout: float, *, only: str | None = None) -> bool:
        """Wait at most ``timeout`` seconds until everything, or what tracker ``only`` was given, is written.

        Returns whether it is.  A tracker that is off has nothing to write.
        """
        deadline = time.monotonic() + timeout
        written = [worker.idle_by(deadline) for worker in self._workers if only in (None, worker.name)]
        self._report()
        return all(written)

    def conclude(self, end: RunEnd) -> None:
        """Trackers that are not closed by now are told how the run ended, when they are."""
        for worker in self._workers:
            worker.conclude(end)

    def close(self, timeout: float = 300.0) -> None:
        """End every tracker when it has written what it was given; one that takes longer is left behind."""
        close_all([self], timeout)

    def _report(self) -> None:
        for worker in self._workers:
            if (news := worker.news()) is not None:
                warn(news, RuntimeWarning)


def settle_all(groups: Collection[Trackers], timeout: float) -> None:
    """Give the trackers of several SAEs ``timeout`` seconds, together, to take what they were given.

    One that was not done in time is not waited for again until it has been.
    """
    deadline = time.monotonic() + timeout
    for trackers in groups:
        for worker in trackers._workers:
            worker.settle(deadline)
        trackers._report()


def close_all(groups: Sequence[Trackers], timeout: float = 300.0) -> bool:
    """Close the trackers of several SAEs, at the same time and within one ``timeout`` in seconds.

    Returns whether all have taken everything, rather than being left behind or off, or never having started.
    """
    deadline = time.monotonic() + timeout
    workers = [worker for trackers in groups for worker in trackers._workers]
    for worker in workers:  # first all, so that none waits for another, also if this is interrupted
        worker.close()
    for worker in workers:
        if not worker.left_behind and not worker.ended_by(deadline):
            worker.leave_behind(timeout)
    for trackers in groups:
        trackers._report()
    owed = any(records for trackers in groups for records in trackers.waiting().values())
    return not owed and not any(worker.left_behind for worker in workers)


class _Worker:
    """The thread of one tracker; all other methods are for the training thread.

    The thread is a daemon: a process must be able to end although a tracker hangs.
    """

    def __init__(self, name: str, tracker: Tracker, waiting: Sequence[Record]) -> None:
        self.name = name
        self.tracker = tracker
        self.cares_of_saes = isinstance(tracker, TakesCheckpoints)
        self.failure: str | None = None
        self.left_behind = False
        self._lags = False
        self._reported = False
        self._off = False
        self._closing = False
        self._end: RunEnd | None = None
        self._jobs: deque[Record] = deque(waiting)
        self._owed: deque[Record] = deque(maxlen=WAITING_AT_MOST)
        """Of a tracker that is off, what it has not taken: for the run that goes on with this one."""
        self._now: Record | None = None
        self._changed = threading.Condition()  # guards all of the above
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    @property
    def works(self) -> bool:
        with self._changed:
            return not self._off

    def hand_over(self, job: Record) -> None:
        with self._changed:
            if self._off and job.folder is None:
                self._owed.append(job)
            if self._off or self._closing:
                return
            if len(self._jobs) < WAITING_AT_MOST:
                self._jobs.append(job)
                self._changed.notify_all()
            else:
                n = len(self._jobs)
                self._fail(f"tracker {self.name} is too slow: {n:,} records waited at step {job.step}; it is off now")

    def waiting(self) -> list[Record]:
        with self._changed:
            if self._off:
                return list(self._owed)
            return [*([] if self._now is None else [self._now]), *self._jobs]

    def needs(self, folder: Path) -> bool:
        with self._changed:
            jobs = [*self._jobs, *([] if self._now is None else [self._now])]
        return any(job.folder is not None and job.folder.is_relative_to(folder) for job in jobs)

    def forget(self, folder: Path) -> None:
        with self._changed:
            kept = [job for job in self._jobs if job.folder is None or not job.folder.is_relative_to(folder)]
            self._jobs.clear()
            self._jobs.extend(kept)

    def settle(self, deadline: float) -> None:
        self._lags = not self.idle_by(0.0 if self._lags else deadline)

    def idle_by(self, deadline: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: self._off or not (self._jobs or self._now), max(0.0, deadline - time.monotonic())
            )

    def conclude(self, end: RunEnd) -> None:
        with self._changed:
            self._end = self._end if self._closing else end

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def ended_by(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def leave_behind(self, timeout: float) -> None:
        """It may go on for as long as the process lives, but nobody waits for it."""
        with self._changed:
            self.left_behind = True
            left = len(self._jobs) + (self._now is not None)
            self.failure = self.failure or (
                f"tracker {self.name} did not end within {timeout:g} s and is left behind"
                + (f" with {left:,} records to write" if left else "")
            )

    def news(self) -> str | None:
        """The failure, the first time that it is asked for."""
        with self._changed:
            if self.failure is None or self._reported:
                return None
            self._reported = True
            return self.failure

    def _fail(self, failure: str) -> None:
        with self._changed:
            self.failure = self.failure or failure
            if not self._off:  # SAE folders are not kept for it
                left = [*([] if self._now is None else [self._now]), *self._jobs]
                self._owed.extend(record for record in left if record.folder is None)
            self._off = True
            self._jobs.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        """The thread."""
        # A tracker is a stranger: nothing that it raises may stop anything, SystemExit and the like included.
        while (job := self._next()) is not None:
            try:
                job.give(self.tracker)
            except BaseException as error:
                if not self._waits_for_room(error, job):
                    self._fail(f"tracker {self.name} failed at step {job.step} and is off now: {error_text(error)}")
        with self._changed:
            end = self._end  # none yet for one that is off before the run ends
        if end is not None and isinstance(self.tracker, Concludes):
            self._last(functools.partial(self.tracker.conclude, end), "conclude")
        self._last(self.tracker.close, "close")

    def _waits_for_room(self, error: BaseException, job: Record) -> bool:
        """Have ``job`` come again where ``error`` is that of a full disk, unless all is to end.

        A checkpoint that does not fit fills a disk only until it is given up, and what is not on it has not been taken.
        """
        full = isinstance(error, OSError) and error.errno in _FULL
        with self._changed:
            if not full or self._closing or self._off:
                return False
            self._jobs.appendleft(job)
            self._now = None
            self._changed.wait(_AGAIN)
            return True

    def _last(self, call: Callable[[], object], doing: str) -> None:
        try:
            call()
        except BaseException as error:
            self._fail(f"tracker {self.name} failed to {doing}: {error_text(error)}")

    def _next(self) -> Record | None:
        """Wait for a call to make; None: there will be none."""
        with self._changed:
            self._now = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._jobs or self._closing or self._off)
            self._now = self._jobs.popleft() if self._jobs else None
            return self._now


def start_trackers(
    config: TrainConfig,
    plugins: PluginManager,
    folder: Path,
    *,
    resumed_at: int | None = None,
    waiting: TrackersState | None = None,
) -> Trackers:
    """The configured trackers and the one that is always there, at work for the run in ``folder``.

    ``resumed_at`` is the step after which a run that was stopped goes on, and ``waiting`` what its trackers had not
    taken.  Raises :class:`saekit.errors.SaekitError`
    for what is wrong with the choice (a missing package, say), and when the tracker that is always there cannot start.
    Any other that cannot (no login, no network) is reported by a warning and left out.
    """
    data = plain_config(config, plugins)
    folder = folder.absolute()  # their threads may outlast a change of the working directory
    run = RunInfo(name=folder.name, folder=folder, config=data, resumed_at=resumed_at, file=TrackerFiles(folder).path)
    chosen, started = chosen_trackers(config, plugins), dict[str, Tracker]()
    try:
        for key, choice in chosen.items():
            try:
                started[key] = choice.build(run=run)
            except PluginFailedError as error:  # what a stranger's package raises when it has no network, say
                _cannot_start(key, error.__cause__ or error)
            except SaekitError:
                raise
            except (Exception, SystemExit) as error:  # whatever a stranger's package raises when it has no network
                _cannot_start(key, error)
    except BaseException as error:
        begun = Trackers(started)
        begun.conclude(RunEnd("failed", error_text(error)))
        begun.close()
        raise
    unstarted = {key: () for key in chosen if key not in started}
    return Trackers(started, {**unstarted, **(waiting or {})})


def _cannot_start(key: str, error: BaseException) -> None:
    if key == ALWAYS_TRACKED:  # without it nothing would be recorded
        kind = StorageError if isinstance(error, OSError) else PluginError
        raise kind(f"the tracker {key} cannot start: {error_text(error)}") from error
    warn(
        f"the tracker {key} cannot start and is off: {error_text(error)}; the other trackers have the metrics",
        RuntimeWarning,
    )
