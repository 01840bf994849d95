"""What a tracker promises."""

from __future__ import annotations

import copy
import hashlib
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.abilities import Concludes, TakesCheckpoints
from saekit.defaults import ALWAYS_TRACKED, DEFAULT_ARCHITECTURE
from saekit.reasons import error_text
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.two_processes import DATA, on_two
from saekit.values import Histogram, Metrics, RunEnd, RunInfo

if TYPE_CHECKING:
    from saekit.distributed import World

CHECKS = Checks()
_METRICS: Metrics = {
    "losses/overall_loss": 1.5,
    "details/current_learning_rate": 1e-4,
    "metrics/no_number": math.nan,
    "metrics/no_end": math.inf,
    "weights/b_e": Histogram((3, 0, 5), (-1.0, 0.0, 0.5, 2.0)),
    "plots/many": Histogram((1,) * 600, tuple(map(float, range(601)))),
}
_CONFIG = {"training": {"lr": 1e-4, "seed": None}, "sae": {"name": DEFAULT_ARCHITECTURE}, "trackers": [ALWAYS_TRACKED]}
_ENDS = (RunEnd("finished"), *(RunEnd(how, "why") for how in ("interrupted", "diverged", "failed")))
_PATIENCE, _GRACE = 30.0, 2.0


def _run(place: Path, *, resumed_at: int | None = None, name: str = "a run", asked: list[str] | None = None) -> RunInfo:
    """A run in a folder of ``place``; in ``asked`` are the names that the tracker has asked it for."""
    folder = place / name
    folder.mkdir(exist_ok=True)

    def file(name: str) -> Path:
        if asked is not None:
            asked.append(name)
        return folder / name

    return RunInfo(name=name, folder=folder, config=copy.deepcopy(_CONFIG), resumed_at=resumed_at, file=file)


def _in_its_thread(work: Callable[[], Any]) -> None:
    """As a run does: what it raises is a fault."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    must(not thread.is_alive(), f"it has not returned after {_PATIENCE:.0f} s")
    if raised:
        raise Fault(f"in the thread of its own it raised {error_text(raised[0])}") from raised[0]


def _logged(tracker: Any, steps: Any) -> None:
    for step in steps:
        tracker.log(dict(_METRICS), step)


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built for a run, and keeps to its protocol; it can be closed again at once."""
    tracker = subject.build(run=_run(subject.place))
    _in_its_thread(tracker.close)


@CHECKS.add
def log(subject: Subject) -> None:
    """It takes numbers (no number and infinity, too) and histograms, in a thread of its own, and leaves them as they
    are."""
    tracker = subject.build(run=_run(subject.place))
    given = dict(_METRICS)

    def work() -> None:
        for step in (1, 2, 5):
            tracker.log(given, step)
        tracker.log({}, 6)

    try:
        _in_its_thread(work)
    finally:
        _in_its_thread(tracker.close)
    must(list(given) == list(_METRICS) and all(given[name] is _METRICS[name] for name in given), "log changes metrics")


@CHECKS.add
def own_files(subject: Subject) -> None:
    """What it writes in the run folder is where ``run.file(name)`` says, so that it is nobody else's."""
    asked: list[str] = []
    run = _run(subject.place, asked=asked)
    tracker = subject.build(run=run)
    _in_its_thread(lambda: _logged(tracker, [1, 2]))
    _in_its_thread(tracker.close)
    strange = [path.name for path in run.folder.iterdir() if path.name not in asked]
    must(not strange, f"it writes {', '.join(strange)} in the run folder, and did not ask run.file for it")
    beside = [path.name for path in subject.place.iterdir() if path != run.folder]
    must(not beside, f"it writes {', '.join(beside)} beside the run folder")
    must(run.config == _CONFIG, "it changes run.config")


@CHECKS.add
def resume(subject: Subject) -> None:
    """A run that goes on hands over again what it had logged for later steps, and perhaps a record twice."""
    first = subject.build(run=_run(subject.place))
    _in_its_thread(lambda: _logged(first, range(1, 6)))
    _in_its_thread(first.close)
    again = subject.build(run=_run(subject.place, resumed_at=3))
    _in_its_thread(lambda: _logged(again, [3, 3, 4, 5, 6]))
    _in_its_thread(again.close)


@CHECKS.add
def two_processes(subject: Subject) -> None:
    """In a run of several processes the first alone has it, and it waits for no other: all go on meanwhile."""
    import torch

    def followed(world: World) -> list[float]:
        tracker = subject.build(run=_run(subject.place)) if world.main else None
        told = []
        for step in (1, 2):
            if tracker is not None:
                _in_its_thread(partial(_logged, tracker, [step]))
            told.append(float(world.all.sum(torch.tensor(float(step)))))
        if tracker is not None:
            _in_its_thread(tracker.close)
        return told

    for number, told in enumerate(on_two({DATA: followed}, subject.place)[DATA]):
        must(told == [2.0, 4.0], f"what process {number} heard of the other is {told}, expected [2.0, 4.0]")


@CHECKS.add
def several(subject: Subject) -> None:
    """Several follow several runs of one process at once."""
    trackers = [subject.build(run=_run(subject.place, name=name)) for name in ("one", "another")]
    for step in (1, 2):
        for tracker in trackers:
            _in_its_thread(partial(tracker.log, dict(_METRICS), step))
    for tracker in trackers:
        _in_its_thread(tracker.close)
    used = [run for run in ("one", "another") if any((subject.place / run).iterdir())]
    must(len(used) != 1, f"two trackers have written into the one folder {used}")


@CHECKS.add
def checkpoints(subject: Subject) -> None:
    """``log_checkpoint(folder, step)``, where there is one, leaves the folder as it is."""
    run = _run(subject.place)
    tracker = subject.build(run=run)
    try:
        if not isinstance(tracker, TakesCheckpoints):
            raise NotTried("it has none")
        folder = subject.place / "checkpoint"
        folder.mkdir()
        for name in ("cfg.json", "sae_weights.safetensors"):
            (folder / name).write_bytes(name.encode())
        before = _sums(folder)
        _in_its_thread(partial(tracker.log_checkpoint, folder, 2))
        must(_sums(folder) == before, "log_checkpoint changes the folder")
    finally:
        _in_its_thread(tracker.close)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@CHECKS.add
def end(subject: Subject) -> None:
    """Where it has ``conclude(end)``, it takes every way in which a run may end, after the last record."""
    for number, how in enumerate(_ENDS):
        tracker = subject.build(run=_run(subject.place, name=f"run {number}"))
        try:
            if not isinstance(tracker, Concludes):
                raise NotTried("it is not told how a run ends")
            _in_its_thread(partial(_logged, tracker, [1]))
            _in_its_thread(partial(tracker.conclude, how))
        finally:
            _in_its_thread(tracker.close)


@CHECKS.add
def close(subject: Subject) -> None:
    """After ``close`` no thread of it is left that would keep the process alive."""
    before = {*threading.enumerate()}
    tracker = subject.build(run=_run(subject.place))
    _in_its_thread(lambda: _logged(tracker, [1]))
    _in_its_thread(tracker.close)
    left = [thread for thread in {*threading.enumerate()} - before if not thread.daemon]
    for thread in left:
        thread.join(_GRACE)
    left = [thread for thread in left if thread.is_alive()]
    must(not left, f"after close() there is still the thread {left[0].name if left else ''}")
