"""How long a planned run takes, from timings of its own parts: forwards or reads, steps, evals, writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch

from saekit.abilities import StatesForwards
from saekit.config import SAEConfig, TrainConfig
from saekit.data import Corpus, StreamContext
from saekit.data.activations import is_out_of_memory
from saekit.devices import free_memory
from saekit.distributed.world import World
from saekit.errors import ConfigError, DataError, SaekitError
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.reasons import reason
from saekit.runs.other_backends import told_of_other_forwards, told_of_others
from saekit.runs.other_ways import SIZES_FACT, told_of_ways
from saekit.runs.planned_mesh import in_step
from saekit.runs.planned_sizes import Sizes
from saekit.runs.planned_time import (
    Served,
    Stopwatch,
    Times,
    evals_of,
    ran_ahead,
    timed_copy,
    timed_eval,
    timed_pictures,
    timed_writing,
)
from saekit.runs.rehearsal import Deadline, FirstRows, ForwardStage, Rehearsed, rehearsed
from saekit.runs.setup import give_weights, make_trainer
from saekit.runs.supervised import SupervisedSource
from saekit.runs.working_memory import resident_peak
from saekit.sae.module import SAEModule
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram, Ports

__all__ = ["TimedRun"]

_T = TypeVar("_T")

_UNSURE = 1.5  # as many times as long may a run take as is planned
_MANY = 1.1  # as many forwards as training takes, to be worth a word
_FIRINGS = 10.0  # of the average feature in the first step, for silence to mean something


@attrs.define
class TimedRun:
    """Times parts of a run, and puts them together."""

    config: TrainConfig
    plugins: PluginManager
    options: SAEConfig
    world: World
    stream: StreamContext
    corpus: Corpus
    backend: ModelBackend
    ports: Ports
    counted: Sizes
    opening: float = attrs.field(kw_only=True)
    """Seconds that it took to come here, as a run does."""
    start: SAEModule | None = attrs.field(kw_only=True)
    alone: bool = attrs.field(kw_only=True)
    """Whether the model was loaded by its name, so that others can load it, too."""
    measure: bool = attrs.field(kw_only=True)
    """Whether other ways to run the model are timed that take long to try."""
    facts: dict[str, str] = attrs.field(init=False, factory=dict)
    numbers: dict[str, float] = attrs.field(init=False, factory=dict)
    warnings: list[str] = attrs.field(init=False, factory=list)
    peak: float | None = attrs.field(init=False, default=None)
    """The most bytes that the run's process has while it trains, measures and draws; None where that is not told."""
    rows_missing: float = attrs.field(init=False, default=0.0)
    """Bytes of the run's buffer that are not there while parts of it are tried."""
    logged: Mapping[str, float | Histogram] = attrs.field(init=False, factory=dict)
    """Metrics of the first step."""
    _full: bool = attrs.field(init=False, default=False)  # memory did not suffice to time it

    def time(self, source: SupervisedSource | None, schedule: Any, evals: Mapping[str, Eval], reads: bool) -> None:
        """All of it; the source ``reads`` the text, and so runs the model, or has what the model made."""
        runs_model = source is None or reads
        if self.options.d_in not in (None, self.ports.d_in):
            self.facts["duration"] = "not measured: the SAE is not as wide as its activations"
        else:
            self._parts(source, schedule, evals, runs_model=runs_model)
        if runs_model and not self._full:  # after all that a run does, whose memory is told by the peak of it
            self._others()
        elif self.measure and not runs_model:
            self.facts[SIZES_FACT] = "not compared: the activations are there, and training runs no model"

    def _parts(
        self, source: SupervisedSource | None, schedule: Any, evals: Mapping[str, Eval], *, runs_model: bool
    ) -> None:
        """What a run is made of, in its order; as far as it can be timed."""
        deadline = Deadline()
        begun = self._tried(lambda: self._first_rows(source, deadline, runs_model=runs_model))
        if begun is None:
            return
        rows, first = begun
        made = self._tried(lambda: self._trainer(first, schedule), refuses=True)
        if made is None:
            return
        trainer, weights = made
        found = self._tried(lambda: self._rehearsed(rows, trainer, first, deadline, runs_model=runs_model))
        if found is None:
            return
        evaluated, cold = self._measuring(trainer, evals, deadline)
        self._put_together(found, weights, evaluated, cold, runs_model=runs_model)

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
        self.facts["duration"] = f"not measured: {why}"
        self.warnings.append(f"the run could not be timed: {why}")
        if self._full:
            free_memory()
        return None

    def _first_rows(
        self, source: SupervisedSource | None, deadline: Deadline, *, runs_model: bool
    ) -> tuple[Any, FirstRows]:
        """Where rows come from, and the first of them."""
        rows: Any = source
        if runs_model:  # a source that states no forwards may have read its text when it was opened
            own = self.stream.own
            stream = own if source is None or isinstance(source, StatesForwards) else own.afresh()
            rows = ForwardStage(stream, self.counted.source, deadline)
        seconds = Stopwatch()
        with seconds():
            batch = next(rows, None)
        if batch is None:
            raise DataError("there are no activations; is there any text?")
        return rows, FirstRows(seconds.seconds / len(batch), batch)

    def _put_together(
        self, found: Rehearsed, weights: float, evaluated: float | None, cold: float, *, runs_model: bool
    ) -> None:
        """``evaluated``: seconds of one measuring, and ``cold`` what the first takes beyond."""
        training, size = self.config.training, self.world.size
        batch = max(training.train_batch_size_tokens // size, 1)
        served = Served(capacity=batch, forward=batch, ahead=False)
        if runs_model:
            source, forward = self.counted.source, self.counted.rows_per_forward()
            served = Served(
                capacity=forward * source.buffered, forward=forward, ahead=source.ahead, shared=found.shared,
                needed=source.needed,
            )  # fmt: skip
            self._tell_of_forwards(served, batch)
        mean_step = found.mean_step(training.steps, training.dead_after)
        filling, waiting = ran_ahead(served, batch, training.steps, found.per_row, mean_step)
        number = evals_of(self.config)
        times = Times(
            opening=self.opening,
            filling=filling,
            weights=weights,
            forwards=waiting,
            steps=mean_step * training.steps,
            step=found.step,
            cold=found.cold,
            evals=None if evaluated is None else number * evaluated + cold,
            evals_before=0.0 if not evaluated or number < 2 else (number - 1) * evaluated + cold,
            saving=self._saving(),
            pictures=self._pictures(),
        )
        copies = self._copies(times.last)
        if times.evals is not None and not copies:
            self.counted.forget_copies()
        times = attrs.evolve(times, copies=copies * timed_copy(self.counted.numbers.get("checkpoint_bytes", 0.0)))
        self.numbers |= times.numbers()
        if runs_model:
            self.counted.time_recipe(found.per_row)
        what = "the model" if runs_model else "reading activations"
        made = "forwards" if runs_model else "reads"
        on = f"timed on {found.forwards:,} {made} and {found.steps:,} step{'s' * (found.steps != 1)}"
        self.facts["duration"] = times.text(what, messages=size > 1, on=on)

    def _copies(self, seconds: float) -> int:
        """How many checkpoints may come before the last step, of a run whose steps end after about so many seconds."""
        chosen = self.config.checkpoints
        every = 60 * chosen.every_minutes
        by_clock = int(_UNSURE * seconds / every) if chosen.keep_last and every > 0 else 0
        return chosen.n_checkpoints + by_clock

    def _tell_of_forwards(self, served: Served, batch: int) -> None:
        """How many there are, and how not to make those that training does not take, where that is many."""
        steps, line = self.config.training.steps, self.counted.source.needed_line
        self.numbers["forwards"] = made = served.forwards(batch, steps)
        needed = attrs.evolve(served, needed=True).forwards(batch, steps)
        self.facts["forwards"] = f"{made:,} of {served.forward:,} activations"
        if line and made > _MANY * needed:
            self.facts["forwards"] += (
                f"; training takes those of {needed:,}, and the buffer is full when it ends. Without the others: write "
                f"{line}; the last batches are others then, drawn from fewer activations"
            )

    def _trainer(self, first: FirstRows, schedule: Any) -> tuple[SAETrainer, float]:
        """An SAE in training, with its first weights, and how many seconds that takes."""
        config, clock = in_step(self.config, self.world), Stopwatch()
        with clock():
            trainer = make_trainer(
                config,
                self.plugins,
                self.backend,
                self.corpus,
                self.options,
                self.ports,
                schedule,
                world=self.world.column,
            ).in_turns(self.stream.model_lock)  # as in a run, where forwards and steps of another precision take turns
            batch = first.batch
            assert batch is not None
            give_weights(trainer, config, self.corpus, lambda: batch.activations, self.start)
        self.facts["SAE step"] = trainer.step_path()
        return trainer, clock.seconds

    def _rehearsed(
        self, rows: Any, trainer: SAETrainer, first: FirstRows, deadline: Deadline, *, runs_model: bool
    ) -> Rehearsed:
        """A few batches, as the loop makes them."""

        def look(metrics: Mapping[str, float | Histogram]) -> None:
            self.logged = metrics
            if self.world.features.size == 1:  # of a part, nothing is known of the whole
                self._first_step(trainer, metrics)

        beside = torch.device(self.backend.device) != torch.device(trainer.device)  # and so nothing is shared
        found, peak = resident_peak(
            lambda: rehearsed(
                rows,
                trainer,
                first,
                forward=self.counted.rows_per_forward() if runs_model else 0,
                ahead=runs_model and self.counted.source.ahead,
                alone=0.0 if beside else 1.0,
                look=look,
                deadline=deadline,
            )
        )
        if torch.device(self.counted.buffer_device).type == "cpu":  # what is mixed is less here than in the run
            self.rows_missing = max(self.counted.numbers.get("buffer_bytes", 0.0) - found.held, 0.0)
        self._note(peak)
        return found

    def _note(self, peak: float | None) -> None:
        """``peak``: the most bytes that this process had while it did a part of a run, without all of the buffer."""
        if peak is not None:
            self.peak = max(self.peak or 0.0, peak + self.rows_missing)

    def _pictures(self) -> float | None:
        """Seconds to draw them; None where that cannot be told."""
        if not self.config.reports.pictures or not self.world.main:
            return 0.0
        try:
            seconds, peak = resident_peak(lambda: timed_pictures(self.config, self.plugins, self.logged))
        except (OSError, SaekitError) as error:  # as where no temporary folder can be written
            self.warnings.append(f"pictures could not be timed: {reason(error)}")
            return None
        self._note(peak)
        return seconds

    def _measuring(
        self, trainer: SAETrainer, evals: Mapping[str, Eval], deadline: Deadline
    ) -> tuple[float | None, float]:
        """Seconds of one measuring, None where that cannot be told; and what the first takes beyond that."""
        if not evals_of(self.config):
            return 0.0, 0.0
        if self.world.size > 1 or not evals:
            return None, 0.0
        contexts = self.corpus.held_out(self.backend, seed=0) if self.config.evals.reads_text else None
        with self.stream.model_lock:
            try:
                found, peak = resident_peak(
                    lambda: timed_eval(self.config, trainer, self.backend, evals, contexts, deadline.left)
                )
            except Exception as error:  # evals of plugins raise what they like, and the run itself goes on without
                self.warnings.append(f"evals could not be timed: {reason(error)}")
                return None, 0.0
        self._note(peak)
        return found

    def _first_step(self, trainer: SAETrainer, metrics: Mapping[str, float | Histogram]) -> None:
        """The features that no activation makes fire before anything is learned."""
        silent = int((trainer.firing.since_fired > 0).sum())
        d_sae, n = trainer.sae.d_sae, trainer.tokens
        share = float(metrics["metrics/l0"]) * n / d_sae  # type: ignore[arg-type]  # how often the average one fires
        self.numbers["silent_at_start"] = silent
        self.facts["silent at start"] = f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens"
        if silent > d_sae / 2 and share > _FIRINGS:  # with fewer, chance alone leaves many out
            self.warnings.append(
                f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens, though a feature fires "
                f"{share:,.0f} times on average; many may stay dead. Start b_dec at the mean of activations "
                "(sae.b_dec_init_method=mean), or choose fewer features"
            )

    def _saving(self) -> float:
        """Seconds that are waited for the disk at the end; checkpoints before that are written behind the loop."""
        written = self.counted.saved + self.counted.numbers.get("checkpoint_bytes", 0.0)
        return timed_writing(self.config.checkpoints.folder, written)

    def _others(self) -> None:
        """Other ways of this backend, and other backends of the same model."""
        rows = self.stream.rows_per_context(self.corpus.context_size)
        own = max(self.counted.rows_per_forward() // rows, 1)
        tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(8).tokens)
        with self.stream.model_lock:
            if found := told_of_other_forwards(self.config, self.backend, tokens[:own]):
                self.facts["other forwards"] = "; ".join(found)
        if self.alone and (found := told_of_others(self.config, self.plugins, self.backend, tokens)):
            self.facts["other backends"] = "; ".join(found)
        if self.measure:
            tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(4 * own).tokens)
            size = self.counted.numbers.get("forward_bytes", 0.0)
            with self.stream.model_lock:
                self.facts |= told_of_ways(
                    self.config,
                    self.plugins,
                    self.backend,
                    tokens,
                    size,
                    self.counted.source,
                    rows=rows,
                    alone=self.alone,
                )
