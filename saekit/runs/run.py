"""The work of ``saekit.train`` and ``saekit.resume``: from configurations to saved SAEs."""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.ambient import ambient
from saekit.config import TrainConfig
from saekit.data.activations import check_contexts
from saekit.distributed.agreement import left_by_all
from saekit.distributed.world import World, open_world, trains_on_cuda
from saekit.errors import (
    DataError,
    DivergedError,
    LostProcessError,
    StorageError,
    TrainingInterrupted,
    resume_command,
)
from saekit.files.paths import here
from saekit.kernels.workspace import SHARED
from saekit.kinds import ACTIVATION_SOURCES
from saekit.plugins.manager import PluginManager
from saekit.runs.away import start_of
from saekit.runs.checkpoints import all_checkpoints
from saekit.runs.checks import alone_in, has_model
from saekit.runs.ending import Ending, end_of
from saekit.runs.folder import RunFolderLostError, Standing, check_run_folder, rescue_folder, run_folder
from saekit.runs.interruption import Interruption
from saekit.runs.measuring import evaluate
from saekit.runs.observers import EvalObserver, TrackerObserver
from saekit.runs.progress import TrainingProgress
from saekit.runs.randomness import seeded
from saekit.runs.record import RunRecord
from saekit.runs.results import SweepResult, TrainResult
from saekit.runs.resuming import Resumption
from saekit.runs.saving import Saving
from saekit.runs.session import Member, Session
from saekit.runs.spreading import check_alike, check_same_rows
from saekit.runs.summary import write_summary
from saekit.runs.sweep import changed_options, member_names
from saekit.runs.trackers import Trackers, close_all, start_trackers
from saekit.runs.trained import healthy, is_alone, result_of, save_saes, warn_of_saes
from saekit.runs.waiting import TrackersState
from saekit.status import Status
from saekit.training.elsewhere import check_all
from saekit.training.loop import fit
from saekit.values import RunEnd

__all__ = ["begin", "go_on"]

_INTERRUPTED_TOO = "that was interrupted, too"
_SLOW = 5.0
"""Seconds: whoever interrupts, as a cluster does, does not wait for two checkpoints that each take longer."""


def begin(
    configs: Sequence[TrainConfig],
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    *,
    alone: bool,
    say: Status | None = None,
) -> TrainResult | SweepResult:
    """Train a new run of ``configs``, which :mod:`saekit.commands.preflight` has seen: one ``alone``, or a sweep."""
    with open_world(configs[0].distributed, cuda=trains_on_cuda(configs[0])) as world, world.accounted():
        return _begin(configs, plugins, model, dataset, world, alone=alone, say=say)


def _begin(
    configs: Sequence[TrainConfig],
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    world: World,
    *,
    alone: bool,
    say: Status | None,
) -> TrainResult | SweepResult:
    if alone:
        name, names, home = configs[0].checkpoints.name, ["sae"], "."
    else:
        (name, names), home = member_names(configs, plugins), None
    check_alike(world, configs, plugins)
    world.all.once(lambda: check_run_folder(configs[0], name))
    given_in = here()
    opened = dict(zip(names, configs, strict=True))
    with (
        ambient(),
        seeded(configs[0].training.seed),  # from here on, since plugins may draw when they are built, too
        contextlib.closing(Session(opened, plugins, model, dataset, say=say, world=world)) as session,
    ):
        if world.size > 1:
            check_same_rows(world, session.identity)
        session.give_weights()
        folder = world.all.once(lambda: run_folder(configs[0], name, None if home else "sweep", given_in))
        in_memory = [kind for kind, given in (("model", model), ("dataset", dataset)) if given is not None]
        model_name = str(session.backend.name) if has_model(configs[0], plugins) else ""
        used = dict(item for each in session.used for item in each.metadata.items())
        record = RunRecord(
            folder, {name: home or name for name in names}, tuple(in_memory), model_name, used=used,
            started_in=start_of(configs, plugins, given_in),
        )  # fmt: skip
        if not world.main:
            return _run(session, record)
        record.write({name: member.config for name, member in session.members.items()}, plugins)
        with alone_in(folder):
            return _run(session, record)


def go_on(
    resumption: Resumption,
    plugins: PluginManager,
    model: object | None,
    dataset: object | None,
    say: Status | None = None,
) -> TrainResult | SweepResult:
    """Train what is left of a run; the caller is :func:`saekit.runs.checks.alone_in` its folder."""
    configs = resumption.configs
    first = next(iter(configs.values()))
    with (
        open_world(first.distributed, cuda=trains_on_cuda(first)) as world,
        world.accounted(),
        ambient(),
        seeded(first.training.seed),
        contextlib.closing(Session(configs, plugins, model, dataset, resumption.sizes, say, world)) as session,
    ):
        check_alike(world, list(configs.values()), plugins, resumption.place)
        if world.size > 1:
            check_same_rows(world, session.identity)
        session.say("reading the checkpoint")
        untracked = resumption.load_together(session)
        if world.main:
            resumption.record.write(resumption.configs, plugins)
        return _run(session, resumption.record, resumed=True, untracked=untracked)


def _run(
    session: Session, record: RunRecord, *, resumed: bool = False, untracked: Mapping[str, TrackersState] | None = None
) -> TrainResult | SweepResult:
    """Train what is left, save, evaluate; whatever ends it early leaves a checkpoint."""
    with contextlib.ExitStack() as stack:
        main = session.world.main
        stack.push(functools.partial(_end_together, session.world))
        folders = [record.folder, *(record.home(name) for name in record.saes)] if main else []
        standing = stack.enter_context(Standing(folders))
        ending = Ending(session, record, standing)
        if main:
            stack.push(ending)
        trackers: dict[str, Trackers] = {}

        def close(kind: object, error: BaseException | None, trace: object) -> None:
            _close_trackers(session, trackers, error)

        stack.push(close)
        for name, member in session.members.items():
            if not main:
                trackers[name] = Trackers({})
                continue
            trackers[name] = start_trackers(
                member.config,
                session.plugins,
                record.home(name),
                resumed_at=member.trainer.step if resumed else None,
                waiting=(untracked or {}).get(name, {}),
            )
        interruption = Interruption(session.world.size)
        saving = Saving(session, record.folder, trackers, interruption, standing)
        try:
            with interruption:
                with session.world.accounted():
                    _fit(session, record.folder, trackers, saving, _owed(untracked or {}))
                with session.world.accounted():
                    _save_trained(session, record, saving)
                    if session.world.size == 1:
                        interruption.act_at_once()  # all SAEs are saved, and there are no more steps to wait for
                    summary = _finish(session, record, trackers, saving)
                    saving.check_folder()
                    saving.stop_if_asked()
        except DivergedError:
            raise  # there is nothing worth keeping in its weights
        except BaseException as error:
            _save_after(error, session, record, saving, interruption)
            raise
        finally:
            saving.end()
            SHARED.release()
    warn_of_saes(session)
    return result_of(session, record, summary, ending.pictures)


def _end_together(world: World, kind: object, error: BaseException | None, trace: object) -> None:
    """Of processes that a signal has ended, none is gone before the first has closed what it has open.

    Whoever started them may end the others as soon as one is gone.
    """
    if isinstance(error, TrainingInterrupted) and error.checkpoint is not None and world.size > 1:
        with contextlib.suppress(LostProcessError):
            world.all.words()


def _close_trackers(session: Session, trackers: Mapping[str, Trackers], error: BaseException | None) -> bool:
    """Whether all have taken everything.

    Whoever interrupts a run does not want to wait for a slow tracker, and a cluster does not.
    """
    for name, each in trackers.items():
        each.conclude(_end_of(session.members[name], error))
    return close_all(list(trackers.values()), timeout=300 if error is None else 10)


def _end_of(member: Member, error: BaseException | None) -> RunEnd:
    if member.trainer.diverged is not None:
        return RunEnd("diverged", member.trainer.diverged)
    return end_of(error)


def _fit(
    session: Session, folder: Path, trackers: Mapping[str, Trackers], saving: Saving, owed: Mapping[str, int]
) -> None:
    with TrainingProgress(session, folder) as progress:
        for name, number in owed.items():
            progress.say(f"{number:,} records that {name} had not taken are handed over")
        fit(session.lanes, [EvalObserver(session), TrackerObserver(session, trackers), progress, saving])


def _save_trained(session: Session, record: RunRecord, saving: Saving) -> None:
    """Save every SAE that is worth it; a signal that comes meanwhile takes effect after it."""
    for member in healthy(session):
        _check_exhausted(member, session)
    saving.settle()
    saving.check_folder()
    check_all(session.world.saes, [member.trainer for member in session.members.values()])
    session.say("saving")
    save_saes(session, record)  # all, before the last evals, which may fail
    saving.stop_if_asked()


def _finish(
    session: Session, record: RunRecord, trackers: Mapping[str, Trackers], saving: Saving
) -> Sequence[Mapping[str, Any]]:
    """Measure every SAE that is worth it, and end; returns the summary of a sweep."""
    due = [member for member in healthy(session) if not _just_measured(member)]
    for name, final in evaluate(session, due).items():
        trackers[name].log(final, session.members[name].trainer.step)
        session.members[name].note(final)
    if not healthy(session):
        raise DivergedError(_why(session, record, saving))
    summary: Sequence[Mapping[str, Any]] = []
    if not is_alone(record):
        changed = changed_options([member.config for member in session.members.values()], session.plugins)
        if session.world.main:
            summary = write_summary(record.folder, list(session.members.values()), changed)
    saving.stop_if_asked()
    saving.save_if_possible(finished=True)
    # Else it can be gone on with, and they are handed what they have not taken.
    if session.world.all.once(lambda: _close_trackers(session, trackers, None)):
        saving.finish()
    else:
        _tell_of_owed(session, record, trackers)
    return summary


def _just_measured(member: Member) -> bool:
    """Whether the loop has, after the last step."""
    every = member.config.evals.every_n_steps
    return bool(every) and member.trainer.step % every == 0


def _owed(waiting: Mapping[str, TrackersState]) -> dict[str, int]:
    """How many records each tracker has not taken, by its key and, of several, the name of the SAE."""
    return {
        f"the tracker {key}" + (f" of {name}" if len(waiting) > 1 else ""): len(records)
        for name, state in waiting.items()
        for key, records in state.items()
        if records
    }


def _tell_of_owed(session: Session, record: RunRecord, trackers: Mapping[str, Trackers]) -> None:
    """For people: the warnings have said what became of the trackers."""
    waiting = {name: group.waiting() for name, group in trackers.items()}
    owed = " and ".join(f"{number:,} records for {name}" for name, number in _owed(waiting).items())
    command = f"saekit train --resume {shlex.quote(str(record.folder))}"
    TrainingProgress(session, record.folder).say(
        f"all is trained and saved, but {owed or 'a tracker'} wait; {command} hands them over"
    )


def _why(session: Session, record: RunRecord, saving: Saving) -> str:
    lines = []
    for name, member in session.members.items():
        last = saving.last_good(name)
        kept = f"The last good checkpoint is {last}" if last else "There was no checkpoint before"
        prefix = f"{name}: " if len(session.members) > 1 else ""
        lines.append(f"{prefix}{member.trainer.diverged}. {kept}")
    return "\n".join(lines)


def _check_exhausted(member: Member, session: Session) -> None:
    tokens, wanted = member.trainer.tokens, member.config.training.total_tokens
    source = session.plugins.find(ACTIVATION_SOURCES, member.config.activations.source)
    if not tokens and not source.entry.needs_text:
        raise DataError(f"the activation source {source.key!r} ended before its first batch, so nothing was learned")
    check_contexts(tokens, session.corpus.context_size)
    if tokens < wanted and member.config.dataset.on_exhausted == "error":
        raise DataError(
            f"the data ended after {tokens:,} activations, and {wanted:,} were asked for (training.training_tokens). "
            'Train on fewer, or set dataset.on_exhausted to "repeat" or "stop"'
        )


def _save_after(
    error: BaseException, session: Session, record: RunRecord, saving: Saving, interruption: Interruption
) -> None:
    """Save what there is when training ends early; an interruption is raised as what it is."""
    saved, problem = None, None
    if saving.broken_off:
        problem = _INTERRUPTED_TOO
    elif not left_by_all(error, session.world.all):
        problem = "the other processes of the run need not be at the same step"
    elif session.batches:
        try:
            enough = _SLOW if isinstance(error, KeyboardInterrupt) else math.inf
            saved, record = _saved(session, record, saving, enough)
        except (Exception, KeyboardInterrupt) as failed:  # a full disk, or what the first error was about: tell both
            problem = str(failed) if isinstance(failed, StorageError) else f"{type(failed).__name__}: {failed}"
            if isinstance(failed, KeyboardInterrupt):
                problem = _INTERRUPTED_TOO
    newest = next(all_checkpoints(record.folder), None)
    if isinstance(error, KeyboardInterrupt):
        signal, run = interruption.signal, record.folder
        raise TrainingInterrupted(
            session.batches,
            session.tokens,
            saved,
            run,
            signal=signal,
            problem=problem,
            newest=newest,
            processes=session.world.size,
        ) from error
    command = resume_command(record.folder, session.world.size)
    on = f"{command} goes on from" if newest else "there is no checkpoint to go on from"
    if saved is not None and saved == newest:
        error.add_note(f"the run as it was before is in {saved}; {on} it")
    elif saved is not None:
        error.add_note(f"the SAEs are saved in {saved}, without what training needs; {on} {newest or ''}".rstrip())
    elif problem is not None:
        error.add_note(f"and the run as it was before could not be saved: {problem}; {on} {newest or ''}".rstrip())
    elif saving.failed:
        error.add_note(f"{on} {newest or ''}".rstrip())


def _saved(session: Session, record: RunRecord, saving: Saving, enough: float) -> tuple[Path | None, RunRecord]:
    """Save the session, in a new run folder if the run's own is lost; returns the checkpoint, and the run it is of."""
    try:
        if saving.failed:  # what could not be written a moment ago, unless that was why
            saving.check_folder()
            return None, record
        return saving.save(enough), record
    except RunFolderLostError:
        rescued = session.world.all.once(lambda: _rescued(session, record))
        return saving.save_in(rescued.folder), rescued


def _rescued(session: Session, record: RunRecord) -> RunRecord:
    """A new run folder in the place of one that is lost."""
    rescued = RunRecord(
        rescue_folder(record.folder), record.saes, record.in_memory, record.model, used=record.used,
        started_in=record.started_in,
    )  # fmt: skip
    rescued.write({name: member.config for name, member in session.members.items()}, session.plugins)
    RunRecord.note_end(rescued.folder, RunEnd("failed", f"its folder {record.folder} was lost"), {})
    return rescued
