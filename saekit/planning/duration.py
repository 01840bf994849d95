"""How long a planned run takes, from timings of its own parts: forwards or reads, steps, evals, writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import attrs
import torch

from saekit.abilities import StatesForwards
from saekit.config import TrainConfig
from saekit.data import Corpus
from saekit.data.activations import is_out_of_memory
from saekit.devices import free_memory
from saekit.distributed.world import World
from saekit.errors import ConfigError, DataError, DivergedError, SaekitError
from saekit.planning.batches import Batches
from saekit.planning.evals import EvalTimes
from saekit.planning.findings import of_all
from saekit.planning.kinds import Kinds
from saekit.planning.lanes import PlannedLane
from saekit.planning.members import PlannedMember
from saekit.planning.other_backends import told_of_other_forwards, told_of_others
from saekit.planning.other_ways import SIZES_FACT, told_of_ways
from saekit.planning.rehearsal import Deadline, FirstRows, ForwardStage
from saekit.planning.sae_sizes import training_device
from saekit.planning.sizes import Sizes
from saekit.planning.stepped import Rehearsed
from saekit.planning.times import (
    Stopwatch,
    Times,
    evals_of,
    timed_copy,
    timed_pictures,
    timed_writing,
)
from saekit.planning.trial import Trial
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.reasons import reason
from saekit.runs.supervised import SupervisedSource
from saekit.runs.working_memory import resident_peak
from saekit.training.schedule import ComposedSchedule
from saekit.values import Histogram

__all__ = ["TimedRun"]

_T = TypeVar("_T")

_UNSURE = 1.5  # as many times as long may a run take as is planned


@attrs.define
class TimedRun:
    """Times parts of a run, and puts them together."""

    plugins: PluginManager
    world: World
    corpus: Corpus
    backend: ModelBackend
    counted: Sizes
    opening: float = attrs.field(kw_only=True)
    """Seconds that it took to come here, as a run does."""
    alone: bool = attrs.field(kw_only=True)
    """Whether the model was loaded by its name, so that others can load it, too."""
    measure: bool = attrs.field(kw_only=True)
    """Whether other ways to run the model are timed that take long to try."""
    facts: dict[str, str] = attrs.field(init=False, factory=dict)
    numbers: dict[str, float] = attrs.field(init=False, factory=dict)
    warnings: list[str] = attrs.field(init=False, factory=list)
    peak: float | None = attrs.field(init=False, default=None)
    """The most bytes that the run's process has while it trains, measures and draws; None where that is not told."""
    missing: float = attrs.field(init=False, default=0.0)
    """Bytes on the CPU of the run's buffers and SAEs that are not there while parts of it are tried."""
    logged: Mapping[str, float | Histogram] = attrs.field(init=False, factory=dict)
    """Metrics of a first step."""
    _full: bool = attrs.field(init=False, default=False)  # memory did not suffice to time it

    @property
    def config(self) -> TrainConfig:
        """For what all SAEs have in common."""
        return self.counted.config

    def time(
        self,
        lanes: Sequence[PlannedLane],
        schedules: Mapping[str, ComposedSchedule],
        evals: Mapping[str, Mapping[str, Eval]],
        reads: bool,
    ) -> None:
        """All of it; ``schedules`` and ``evals`` are by the names of the SAEs.

        ``reads``: whether a source reads the text, and so runs the model, or all have what the model made.
        """
        self._parts(lanes, schedules, evals)
        if reads and not self._full:  # after all that a run does, whose memory is told by the peak of it
            self._others()
        elif self.measure and not reads:
            self.facts[SIZES_FACT] = "not compared: the activations are there, and training runs no model"

    def _parts(
        self,
        lanes: Sequence[PlannedLane],
        schedules: Mapping[str, ComposedSchedule],
        evals: Mapping[str, Mapping[str, Eval]],
    ) -> None:
        """What a run is made of, in its order; as far as it can be timed."""
        if not all(member.fits_ports for member in self.counted.members):
            self.facts["duration"] = "not measured: the SAE is not as wide as its activations"
            return
        deadline, kinds = Deadline(), Kinds(lanes, self.counted.here, self.plugins)
        batches, trials = Batches(lanes, self.world, self.counted.context_bytes), list[Trial]()
        try:
            if not self._trials(lanes, kinds, batches, trials, schedules, deadline):
                return
            left = self._tried(kinds.estimate)
        finally:
            self._tell_of_steps(kinds, trials)
        if left is None:
            return
        measured, unmeasured = self._evals(kinds, evals, deadline)
        on = f"timed on {batches.timed_on} and {kinds.timed_on(len(self.counted.here), left)}"
        if unmeasured:
            on += f"; evals of {unmeasured} more, for which there was no time, by those of the others"
        self._put_together(kinds, batches, measured, on)

    def _trials(
        self,
        lanes: Sequence[PlannedLane],
        kinds: Kinds,
        batches: Batches,
        trials: list[Trial],
        schedules: Mapping[str, ComposedSchedule],
        deadline: Deadline,
    ) -> bool:
        """A few batches of each of ``lanes`` that says something new; whether all could be made.

        SAEs that diverge are left out, unless all do.
        """
        diverged = False
        for lane in lanes:
            chosen = kinds.to_try(lane)
            if not chosen or (trials and deadline.passed):
                continue
            trials.append(Trial(lane, self.plugins, self.world, self.corpus, self.backend))
            found = self._rehearsed(trials, kinds, chosen, schedules, deadline, 1 / kinds.lanes_to_try(lanes))
            if found is None:
                return False
            if isinstance(found, DivergedError):
                diverged = True
                continue
            kinds.note(lane, trials[-1].tried(found))
            batches.note(lane, found)
        if diverged and not batches.noted:
            self._untimed("all SAEs that were tried diverge")
            return False
        return True

    def _tried(self, work: Callable[[], _T], *, refuses: bool = False) -> _T | None:
        """``work()``, or None where it fails: that is a warning, since the run has what the plan may not.

        A :class:`ConfigError` is raised, as of a step that cannot be compiled here, which the run would refuse as well;
        where ``work`` ``refuses`` what the run would refuse, so is every other error of saekit's.
        """
        try:
            return work()
        except Exception as error:  # plugins raise what they like
            self._full = is_out_of_memory(error)
            refused = isinstance(error, ConfigError) or (refuses and isinstance(error, SaekitError))
            if refused and not self._full:
                raise
            why = "ran out of memory" if self._full else reason(error)
        self._untimed(why)
        if self._full:
            free_memory()
        return None

    def _untimed(self, why: str) -> None:
        self.facts["duration"] = f"not measured: {why}"
        self.warnings.append(f"the run could not be timed: {why}")

    @staticmethod
    def _first_rows(
        lane: PlannedLane, source: SupervisedSource | None, deadline: Deadline, *, runs_model: bool
    ) -> tuple[Any, FirstRows]:
        """Where rows of ``lane`` come from, and the first of them."""
        rows: Any = source
        if runs_model:  # a source that states no forwards may have read its text when it was opened
            own = lane.stream.own
            stream = own if source is None or isinstance(source, StatesForwards) else own.afresh()
            rows = ForwardStage(stream, lane.counted.source, deadline)
        seconds = Stopwatch()
        with seconds():
            batch = next(rows, None)
        if batch is None:
            raise DataError("there are no activations; is there any text?")
        return rows, FirstRows(seconds.seconds / len(batch), batch)

    def _rehearsed(
        self,
        trials: Sequence[Trial],
        kinds: Kinds,
        chosen: Sequence[PlannedMember],
        schedules: Mapping[str, ComposedSchedule],
        deadline: Deadline,
        share: float,
    ) -> Rehearsed | DivergedError | None:
        """A few batches of the last of ``trials`` for those that are ``chosen`` of its lane, as the loop makes them;
        None: they cannot be timed."""
        trial, lane = trials[-1], trials[-1].lane
        begun = self._tried(lambda: self._first_rows(lane, lane.source, deadline, runs_model=lane.reads))
        if begun is None:
            return None
        rows, first = begun

        def about(member: PlannedMember) -> AbstractContextManager[None]:
            return self.counted.findings.about([one.name for one in kinds.of(member).members])

        if self._tried(lambda: trial.begin(first, chosen, schedules, about, deadline), refuses=True) is None:
            return None

        def rehearse() -> tuple[Rehearsed, float | None] | DivergedError:
            try:
                return resident_peak(lambda: trial.rehearse(rows, first, deadline, share))
            except DivergedError as error:
                if len(self.counted.members) == 1:
                    raise
                return error

        rehearsed = self._tried(rehearse)
        if rehearsed is None or isinstance(rehearsed, DivergedError):
            return rehearsed
        found, peak = rehearsed
        self.logged = self.logged or trial.logged
        # What is mixed is less here than in the run, and SAEs are fewer.
        buffers = sum(size for device, size in self.counted.buffers.items() if _on_cpu(device))
        mixed = found.held if _on_cpu(self.counted.place_of(lane)) else 0
        there = {trainer.name for one in trials for trainer in one.trainers}
        tried = [one for one in self.counted.members if one.name in there]
        absent = self._bytes_on_cpu(self.counted.here) - self._bytes_on_cpu(tried)
        self.missing = max(buffers - mixed, 0.0) + max(absent, 0.0) + self.counted.kept_on_cpu
        self._note(peak)
        return found

    def _bytes_on_cpu(self, members: Sequence[PlannedMember]) -> float:
        """What training ``members`` takes there."""
        return sum(self.counted.saes[one.name].trained for one in members if _on_cpu(training_device(one)))

    def _note(self, peak: float | None) -> None:
        """``peak``: the most bytes that this process had while it did a part of a run, without what is missing."""
        if peak is not None:
            self.peak = max(self.peak or 0.0, peak + self.missing)

    def _tell_of_steps(self, kinds: Kinds, trials: Sequence[Trial]) -> None:
        """How steps are made, and what the first ones show, of the SAEs that came to that and those like them."""
        paths = {name: path for trial in trials for name, path in trial.paths.items()}
        names = [member.name for member in self.counted.here]
        told: dict[str, str] = {}
        for member in self.counted.here:
            if alike := [one.name for one in (member, *kinds.of(member).members) if one.name in paths]:
                told[member.name] = paths[alike[0]]
        if told:
            self.facts["SAE step"] = of_all(told, names)
        texts = {name: text for trial in trials for name, text in trial.silent_texts.items()}
        if texts:
            self.numbers["silent_at_start"] = max(max(trial.silent.values(), default=0) for trial in trials)
            self.facts["silent at start"] = of_all(texts, names if len(texts) == len(names) else texts)
        for name, text in ((name, text) for trial in trials for name, text in trial.doubts):
            self.warnings.append(text if len(self.counted.members) == 1 else f"{name}: {text}")
        if len(self.counted.members) > 1:
            for name, text in ((name, text) for trial in trials for name, text in trial.diverged().items()):
                self.warnings.append(f"{name}: {text}; its steps are not timed")

    def _put_together(self, kinds: Kinds, batches: Batches, measured: tuple[float, float] | None, on: str) -> None:
        """``measured``: seconds of all evals, and of those before the last step; None where that is not known.  ``on``:
        what it was timed on, in words."""
        steps = sum(kind.steps for kind in kinds.all)
        filling, waiting = batches.seconds(steps)
        told, numbers = batches.forwards_told()
        self.facts |= told
        self.numbers |= numbers
        times = Times(
            opening=self.opening,
            filling=filling,
            weights=sum(kind.first_weights for kind in kinds.all),
            forwards=waiting,
            steps=steps,
            step=sum(kind.step for kind in kinds.all),
            cold=batches.cold + sum(kind.cold for kind in kinds.all),
            evals=None if measured is None else measured[0],
            evals_before=0.0 if measured is None else measured[1],
            saving=self._saving(),
            pictures=self._pictures(),
        )
        copies = self._copies(times.last)
        if times.evals is not None and not copies:
            self.counted.forget_copies()
        times = attrs.evolve(times, copies=copies * timed_copy(self.counted.numbers.get("checkpoint_bytes", 0.0)))
        self.numbers |= times.numbers()
        if batches.runs_model:
            self.counted.time_recipe(batches.per_forward)
        what = "the model" if batches.runs_model else "reading activations"
        several = len(self.counted.members) > 1
        self.facts["duration"] = times.text(what, messages=self.world.size > 1, on=on, several=several)

    def _copies(self, seconds: float) -> int:
        """How many checkpoints may come before the last step, of a run whose steps end after about so many seconds."""
        chosen = self.config.checkpoints
        every = 60 * chosen.every_minutes
        by_clock = int(_UNSURE * seconds / every) if chosen.keep_last and every > 0 else 0
        return chosen.n_checkpoints + by_clock

    def _pictures(self) -> float | None:
        """Seconds to draw them; None where that cannot be told."""
        if not self.config.reports.pictures or not self.world.main:
            return 0.0

        def draw() -> tuple[float, float | None]:
            return resident_peak(lambda: timed_pictures(self.config, self.plugins, self.logged))

        try:
            seconds, peak = draw()
            if (saes := len(self.counted.members)) > 1:  # the first imports what draws; of a sweep, there is one more
                seconds += saes * draw()[0]
        except (OSError, SaekitError) as error:  # as where no temporary folder can be written
            self.warnings.append(f"pictures could not be timed: {reason(error)}")
            return None
        self._note(peak)
        return seconds

    def _evals(
        self, kinds: Kinds, evals: Mapping[str, Mapping[str, Eval]], deadline: Deadline
    ) -> tuple[tuple[float, float] | None, int]:
        """Seconds of all measurings, and of those before the last step, None where that cannot be told; and of how many
        SAEs they are estimated."""
        here = self.counted.here
        if self.world.size > 1 and any(evals_of(member.config) for member in here):
            return None, 0
        warn, given = self.warnings.append, (self.plugins, self.corpus, self.backend, self.counted.lanes, kinds, evals)
        found = EvalTimes(*given, warn=warn, note=self._note)
        return found.seconds(here, deadline), found.estimated

    def _saving(self) -> float:
        """Seconds that are waited for the disk at the end; checkpoints before that are written behind the loop."""
        written = self.counted.saved + self.counted.numbers.get("checkpoint_bytes", 0.0)
        return timed_writing(self.config.checkpoints.folder, written)

    def _others(self) -> None:
        """Other ways of this backend, and other backends of the same model."""
        lane = next(lane for lane in self.counted.lanes if lane.reads)
        config, lock = self.counted.reads_all(), lane.stream.model_lock
        rows = lane.stream.rows_per_context(self.corpus.context_size)
        own = max(lane.rows_per_forward // rows, 1)
        tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(8).tokens)
        with lock:
            if found := told_of_other_forwards(config, self.backend, tokens[:own]):
                self.facts["other forwards"] = "; ".join(found)
        if self.alone and (found := told_of_others(config, self.plugins, self.backend, tokens)):
            self.facts["other backends"] = "; ".join(found)
        if self.measure:
            tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(4 * own).tokens)
            size, source = self.counted.numbers.get("forward_bytes", 0.0), lane.counted.source
            with lock:
                self.facts |= told_of_ways(
                    config, self.plugins, self.backend, tokens, size, source, rows=rows, alone=self.alone
                )


def _on_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"
