"""Going on with a run: what may have changed, and what is put back."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs

from saekit.cautions import warn
from saekit.config import TrainConfig
from saekit.config.converter import ConfigConverter
from saekit.config.files import load_config, load_configs, plain_config
from saekit.config.reports import ReportsConfig
from saekit.distributed.launched import Launched
from saekit.errors import (
    ConfigError,
    DataError,
    LostProcessError,
    ModelError,
    PlaceError,
    PluginFailedError,
    StorageError,
)
from saekit.files.names import RUN_FILES
from saekit.files.storage import tidy
from saekit.plugins.manager import PluginManager
from saekit.runs.checkpoints import MANIFEST, Checkpoint, is_checkpoint_name, newest_checkpoint, set_aside, versions
from saekit.runs.facts import check_alike
from saekit.runs.meshes import changed_mesh, check_takes_over
from saekit.runs.record import RunRecord, as_of_today, differences, flat, is_named
from saekit.runs.waiting import TrackersState, waiting_of

if TYPE_CHECKING:
    from saekit.runs.session import Session

__all__ = ["Resumption", "UnusableCheckpointError"]

_FREE = "reports."
_ROWS = "model.activations"
"""What is allowed where rows of a checkpoint that are computed again may be others than they were."""
_FREE_PATHS = {"reports", *(f"{_FREE}{field.name}" for field in attrs.fields(ReportsConfig))}
"""Options that are no part of what a run is: they may change from one part of it to the next."""


class UnusableCheckpointError(StorageError):
    """A checkpoint that is whole, but cannot be gone on from, although nothing has changed."""

    def __init__(self, checkpoint: Path, message: str) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


@attrs.frozen
class Resumption:
    """A run that is to go on, checked as far as its files allow."""

    record: RunRecord
    configs: Mapping[str, TrainConfig]
    checkpoint: Checkpoint | None
    """None: the run was stopped before its first one, and begins anew."""
    allow: frozenset[str]
    """The options, and sections of them, that may differ."""
    changed: frozenset[str]
    """The options of the configuration that differ, all of them allowed."""

    @classmethod
    def of(
        cls,
        folder: Path,
        cfg: Any,
        overrides: Sequence[str],
        allow: Sequence[str],
        plugins: PluginManager,
        model: object | None,
        dataset: object | None,
        unusable: Mapping[Path, str] | None = None,
    ) -> Resumption:
        """See :func:`saekit.resume`; :class:`ConfigError` names every option that was changed and not allowed.

        ``unusable`` names checkpoints that look whole and are not, and why.
        """
        record = RunRecord.read(folder)  # from here on, nothing leads out of it
        launched = Launched.here(os.environ)
        _tidy_before_others(
            record, launched, lambda: _changed(record.configs(plugins), cfg, overrides, plugins, folder)
        )
        _check_beginning(record)
        if (fault := record.way_out()) is not None:
            raise PlaceError(f"{folder} cannot be gone on with: {fault}")
        given = {"model": model, "dataset": dataset}
        if missing := [kind for kind in record.in_memory if given[kind] is None]:
            raise ConfigError(
                f"the run in {folder} was started with a {' and a '.join(missing)} from memory; pass "
                f"{' and '.join(f'{kind}=...' for kind in missing)} to saekit.resume again"
            )
        written = record.configs(plugins)
        new = _changed(written, cfg, overrides, plugins, folder)
        # What the checkpoint was made with, not what config.toml says: that may have been edited since.
        old, checkpoint = written, None
        if not _just_begun(record, new):
            checkpoint = newest_checkpoint(folder, unusable, lambda one: _of_checkpoint(one, new, plugins))
            old = _of_checkpoint(checkpoint, new, plugins)
        changed: dict[str, tuple[Any, Any]] = {}
        for name, config in new.items():
            changed |= differences(old[name], config, plugins)
            if checkpoint is not None:
                changed |= _unsaid(checkpoint.facts["saes"][name]["config"], config, plugins)
        changed = {path: values for path, values in changed.items() if not path.startswith(_FREE)}
        allow = [path for path in allow if path not in _FREE_PATHS]
        why: dict[str, str] = {}
        if checkpoint is not None:
            changed |= changed_mesh(checkpoint.mesh, next(iter(new.values())).distributed, launched, why)
        refuse(changed, frozenset(allow), why)
        identity = checkpoint.facts["identity"] if checkpoint is not None else {}
        _refuse_unused(allow, [*changed, *identity, *_recomputed(checkpoint)])
        if checkpoint is None:
            warn(
                f"the run in {folder} was stopped before its first checkpoint; it begins anew",
                RuntimeWarning,
            )
        else:
            _check_left(checkpoint, old, new, folder)
        return cls(record, new, checkpoint, frozenset(allow), frozenset(changed))

    @property
    def place(self) -> str:
        """The name of the checkpoint."""
        return "" if self.checkpoint is None else self.checkpoint.folder.name

    @property
    def sizes(self) -> dict[str, int]:
        """``d_sae`` of each SAE."""
        saes = {} if self.checkpoint is None else self.checkpoint.facts["saes"]
        return {name: about["d_sae"] for name, about in saes.items()}

    def load_together(self, session: Session) -> Mapping[str, TrackersState]:
        """:meth:`load_into` in each process; where it fails in one, all fail alike, and may all try the one before.

        The error of another process is :class:`UnusableCheckpointError` where those of all are, else
        :class:`StorageError`.
        """
        world = session.world
        if world.size == 1 or self.checkpoint is None:
            return self.load_into(session)
        found: Mapping[str, TrackersState] = {}
        failure: Exception | None = None
        try:
            found = self.load_into(session)
        except LostProcessError:
            raise
        except Exception as error:
            failure = error
        told = None if failure is None else (isinstance(failure, UnusableCheckpointError), str(failure))
        every = [(number, *one) for number, one in enumerate(world.all.objects(told)) if one is not None]
        if not every:
            if world.main:
                set_aside(self.record.folder, self.checkpoint)
            return found
        number, _, text = next((one for one in every if not one[1]), every[0])
        if all(unusable for _, unusable, _ in every):
            raise UnusableCheckpointError(self.checkpoint.folder, f"of process {number}: {text}") from failure
        if failure is not None and not isinstance(failure, UnusableCheckpointError):
            raise failure
        raise StorageError(f"of process {number}: {text}") from failure

    def load_into(self, session: Session) -> Mapping[str, TrackersState]:
        """Put back what the checkpoint holds, or give the first weights where there is none.

        Returns what the trackers of each SAE had not taken.  :class:`UnusableCheckpointError` leaves the session half
        filled.
        """
        from torch import OutOfMemoryError

        checkpoint = self.checkpoint
        if checkpoint is None:
            session.give_weights()
            return {}
        saved, now = checkpoint.facts, dict(session.identity)
        changed = {
            path: (value, now.get(path))
            for path, value in saved["identity"].items()
            if value is not None and now.get(path) is not None and value != now[path]
        }
        refuse(changed, self.allow | self.changed)
        _refuse_unused(self.allow, [*changed, *self.changed, *_recomputed(checkpoint)])
        for package, version in versions().items():
            if saved["versions"].get(package) != version:
                warn(
                    f"the checkpoint was written with {package} {saved['versions'].get(package)}, and this is "
                    f"{version}: the numbers may differ in the last digits from those of a run without a break, and "
                    "options that are not stated may have other defaults",
                    RuntimeWarning,
                )
        column = session.world.column  # of processes that read the text: each of those beside it reads the same
        others = check_takes_over(session.lanes, checkpoint.mesh, column.size)
        try:
            before = checkpoint.streams() if others else []
            stream = before[0] if others else checkpoint.stream(column.rank)
            untracked = {
                name: waiting_of(state, checkpoint.folder.absolute().parent)
                for name, state in stream.get("trackers", {}).items()
                if not column.rank
            }
            session.load_state(stream, lambda name: self._training(checkpoint, session, name), before)
        except (MemoryError, OutOfMemoryError):
            raise
        except Exception as error:  # whatever a plugin makes of a state that is not what it wrote
            cause = error.__cause__ if isinstance(error, PluginFailedError) else error
            named = isinstance(error, (StorageError, PluginFailedError))
            told = str(error) if named else f"{type(error).__name__}: {error}"
            message = f"{checkpoint.folder} does not fit the run as it is now: {told}"
            passing = isinstance(cause, (DataError, ModelError, OSError))  # an older checkpoint would lose steps
            if self.allow or self.changed or passing:
                raise StorageError(message) from error
            raise UnusableCheckpointError(checkpoint.folder, message) from error
        self._refuse_other_rows(session.other_rows, checkpoint)
        if saved["finished"] and not any(lane.training for lane in session.lanes):
            raise ConfigError(
                f"the text of the run in {self.record.folder} ended after {session.tokens:,} activations, so it cannot "
                "train longer on it; to read it again: dataset.on_exhausted=repeat --allow dataset.on_exhausted"
            )
        if session.world.size == 1:
            set_aside(self.record.folder, checkpoint)
        return untracked

    def _refuse_other_rows(self, texts: Sequence[str], checkpoint: Checkpoint) -> None:
        """:class:`ConfigError` where rows did not come out as they were saved; a warning, where that is allowed."""
        # Whoever allows another model expects others.
        of_model = any(name.partition(".")[0] == "model" for name in self.allow)
        if texts and not of_model and not is_named("activations.source.dtype", self.allow):
            way_on = (
                f"Go on where {checkpoint.folder} was written, so that the run ends as it would have; or train on what "
                f"is computed here, which differs in the last digits if nothing else is wrong: --allow {_ROWS}"
            )
            raise ConfigError([(_ROWS, f"{text}. {way_on}") for text in dict.fromkeys(texts)], "the resumed run")
        for text in dict.fromkeys(texts):
            warn(f"{text}. The run goes on with what is computed here", RuntimeWarning)

    def _training(self, checkpoint: Checkpoint, session: Session, name: str) -> Mapping[str, Any]:
        """The training state of an SAE, whose parts that are always of one shape are so."""
        from saekit.runs.spread_checkpoints import training_of

        trainer = session.members[name].trainer
        if not session.members[name].here:
            return dict(checkpoint.facts["saes"][name])
        state, own = training_of(checkpoint, name, trainer.sae), trainer.state_dict()
        if not self.changed:
            check_alike(state.get("firing"), own.get("firing"), f"firing of {name}")
        return state


def _tidy_before_others(
    record: RunRecord, launched: Launched, configs: Callable[[], Mapping[str, TrainConfig]]
) -> None:
    """Nobody looks for a checkpoint where half of one may be going, or coming back.  ``configs`` are to go on with."""
    if launched.size == 1:
        _tidy(record)
        return
    from saekit.distributed.world import before_others  # which imports torch

    before_others(lambda: _tidy(record), next(iter(configs().values())).distributed)


def _tidy(record: RunRecord) -> None:
    for place in {record.folder, *(record.home(name) for name in record.saes)}:
        tidy(place, RUN_FILES.__contains__)
    tidy(record.folder / "checkpoints", is_checkpoint_name)


def _recomputed(checkpoint: Checkpoint | None) -> list[str]:
    """What may be allowed of a checkpoint whose rows are computed again."""
    saes = {} if checkpoint is None else checkpoint.facts["saes"]
    by_recipe = any(about["config"]["checkpoints"].get("buffer") == "recipe" for about in saes.values())
    return [_ROWS] if by_recipe else []


def _changed(
    old: Mapping[str, TrainConfig], cfg: Any, overrides: Sequence[str], plugins: PluginManager, folder: Path
) -> dict[str, TrainConfig]:
    """The configurations to go on with."""
    if cfg is not None and len(old) > 1:
        raise ConfigError(
            f"{folder} is a sweep of {len(old)} SAEs, so one configuration cannot take the place of theirs; change "
            "options of all of them with section.option=value"
        )
    if cfg is not None:
        return {name: load_config(cfg, overrides, plugins=plugins) for name in old}
    return dict(zip(old, load_configs(old.values(), overrides, plugins=plugins, kind=TrainConfig), strict=True))


def _of_checkpoint(
    checkpoint: Checkpoint, now: Mapping[str, TrainConfig], plugins: PluginManager
) -> dict[str, TrainConfig]:
    """The configurations that a checkpoint was made with; where it lies makes no difference."""
    saes = checkpoint.facts["saes"]
    if set(saes) != set(now):
        raise PlaceError(f"{checkpoint.folder} holds {', '.join(saes)}, but the run has {', '.join(now)}")
    old = {}
    for name, config in now.items():
        place = {"folder": config.checkpoints.folder, "name": config.checkpoints.name}
        table = as_of_today(saes[name]["config"])
        table["checkpoints"] = {**table["checkpoints"], **place}
        where = f"{checkpoint.folder / MANIFEST}, saes.{name}.config"
        old[name] = ConfigConverter(plugins).structure(table, TrainConfig, where)
    return old


def _unsaid(saved: Mapping[str, Any], now: TrainConfig, plugins: PluginManager) -> dict[str, tuple[Any, Any]]:
    """Options that the saekit which saved the checkpoint did not have; what they stand for now may be another thing."""
    said = flat(saved)
    table = flat(plain_config(now, plugins))
    sections = {path.rpartition(".")[0] for path in said}  # of a plugin that is chosen by its key alone, none is said
    return {
        path: ("not an option", value)
        for path, value in table.items()
        if path not in said and path.rpartition(".")[0] in sections and not path.startswith("checkpoints.")
    }


def refuse(
    changed: Mapping[str, tuple[Any, Any]], allow: frozenset[str], why: Mapping[str, str] = MappingProxyType({})
) -> None:
    """:class:`ConfigError` for everything that changed and is not in ``allow``, alone or with its section.

    ``why``: in words, where there is more to say of one than that a run that goes on as it was cannot change it.
    """
    problems = [
        (path, f"was {before!r} when the run was saved, and is {now!r} now; "
         f"{why.get(path, 'a run that goes on as it was cannot change it')}. "
         f"To change it all the same: --allow {path} (or allow=[{path!r}])")
        for path, (before, now) in changed.items()
        if not is_named(path, allow)
    ]  # fmt: skip
    if problems:
        raise ConfigError(problems, "the resumed run")


def _refuse_unused(allow: Collection[str], changed: Collection[str]) -> None:
    """:class:`ConfigError` for what is allowed to change, and names nothing that did."""
    if unused := sorted({name for name in allow if not any(is_named(path, [name]) for path in changed)}):
        raise ConfigError(f"allowed to change, but the same as before: {', '.join(unused)}")


def _check_beginning(record: RunRecord) -> None:
    """:class:`StorageError` for a run whose checkpoints are gone: to begin anew would cut its records."""
    folder = record.folder / "checkpoints"
    if os.path.lexists(folder) and not folder.is_dir():
        raise StorageError(f"{folder} is not a folder, so it can hold no checkpoint; move it away. Nothing was changed")
    if record.checkpointed and not _saved_anything(record):
        raise StorageError(
            f"the run in {record.folder} had written checkpoints, and there is none in {folder} any more (a folder "
            "step-N each). Put them back, or start a new run under another checkpoints.name; nothing was changed"
        )


def _saved_anything(record: RunRecord) -> bool:
    """Whether there is an SAE or a checkpoint in the run folder."""
    saved = any((record.home(name) / "sae").exists() for name in record.saes)
    return saved or any((record.folder / "checkpoints").glob("step-*"))


def _just_begun(record: RunRecord, configs: Mapping[str, TrainConfig]) -> bool:
    """Whether there is nothing yet that a new beginning would lose."""
    keeps = all(config.checkpoints.keep_last for config in configs.values())
    return keeps and not _saved_anything(record)


def _reads_again(old: TrainConfig, now: TrainConfig) -> bool:
    """Whether text that had ended is there again."""
    return now.dataset.on_exhausted == "repeat" != old.dataset.on_exhausted


def _check_left(
    checkpoint: Checkpoint, old: Mapping[str, TrainConfig], configs: Mapping[str, TrainConfig], folder: Path
) -> None:
    saes = checkpoint.facts["saes"]
    left = [
        name
        for name, config in configs.items()
        if saes[name]["diverged"] is None
        and config.training.total_tokens
        > max(saes[name]["tokens"], 0 if _reads_again(old[name], config) else old[name].training.total_tokens)
    ]
    if checkpoint.facts["finished"] and not left:
        raise ConfigError(
            f"the run in {folder} is finished. To train it longer, raise training.training_tokens and allow it: "
            f"saekit train --resume {shlex.quote(str(folder))} training.training_tokens=... "
            "--allow training.training_tokens"
        )
