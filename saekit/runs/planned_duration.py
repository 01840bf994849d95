"""How long a planned run takes, from timings of its own parts: forwards or reads, steps, evals, writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from saekit.config import SAEConfig, TrainConfig
from saekit.data import Corpus, StreamContext
from saekit.devices import resolve_device
from saekit.distributed.world import World
from saekit.kinds import ACTIVATION_SOURCES
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.reasons import reason
from saekit.runs.other_backends import told_of_others
from saekit.runs.other_ways import SIZES_FACT, told_of_ways
from saekit.runs.planned_mesh import in_step
from saekit.runs.planned_sizes import Sizes
from saekit.runs.planned_time import Served, Stopwatch, Times, evals_of, ran_ahead, timed_eval, timed_writing
from saekit.runs.setup import give_weights, make_trainer
from saekit.runs.supervised import SupervisedSource
from saekit.runs.timing import silent_at_start, timed, timed_forwards, timed_steps
from saekit.sae.module import SAEModule
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Ports

__all__ = ["TimedRun"]

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

    def time(self, source: SupervisedSource | None, schedule: Any, evals: Mapping[str, Eval], reads: bool) -> None:
        """All of it; the source ``reads`` the text, and so runs the model, or has what the model made."""
        if runs_model := source is None or reads:
            per_row, rows = timed_forwards(self.stream, self.corpus.contexts(self.backend).take)
            self._others()
        else:
            assert source is not None
            if self.measure:
                self.facts[SIZES_FACT] = "not compared: the activations are there, and training runs no model"
            per_row, rows = timed(lambda: next(source, None), self.stream.sites)
        weights, per_step, measuring = self._sae(rows, schedule, evals)
        training, size = self.config.training, self.world.size
        batch = max(training.train_batch_size_tokens // size, 1)
        served = Served(capacity=batch, forward=batch, ahead=False, beside=False)
        if runs_model:
            served = self._served()
            self._tell_of_forwards(served, batch)
        filling, waiting = ran_ahead(served, batch, training.steps, per_row, per_step)
        times = Times(
            opening=self.opening,
            filling=filling,
            weights=weights,
            forwards=waiting,
            steps=per_step * training.steps,
            step=per_step,
            evals=measuring,
            saving=self._saving(),
        )
        self.numbers |= times.numbers()
        if runs_model:
            self.counted.time_recipe(per_row)
        if measuring is not None and not self._saves_meanwhile(times.last + measuring):
            self.counted.forget_copies()
        what = "the model" if runs_model else "reading activations"
        self.facts["duration"] = times.text(what, messages=size > 1)

    def _saves_meanwhile(self, seconds: float) -> bool:
        """Whether a checkpoint may come before the end of about so many ``seconds``."""
        chosen = self.config.checkpoints
        return bool(chosen.n_checkpoints) or 0 < 60 * chosen.every_minutes <= _UNSURE * seconds

    def _served(self) -> Served:
        chosen = self.plugins.options(ACTIVATION_SOURCES, self.config.activations.source)
        forward = self.counted.rows_per_forward()
        device = resolve_device(self.config.training.device, "training.device", self.options.dtype)
        return Served(
            capacity=forward * getattr(chosen, "n_batches_in_buffer", 1),
            forward=forward,
            ahead=bool(getattr(chosen, "prefetch", False)),
            beside=torch.device(self.backend.device) != torch.device(device),
            needed=getattr(chosen, "refill", "full") == "needed",
        )

    def _tell_of_forwards(self, served: Served, batch: int) -> None:
        """How many there are, and how not to make those that training does not take, where that is many."""
        steps = self.config.training.steps
        self.numbers["forwards"] = made = served.forwards(batch, steps)
        needed = attrs.evolve(served, needed=True).forwards(batch, steps)
        self.facts["forwards"] = f"{made:,} of {served.forward:,} activations"
        if made > _MANY * needed:
            self.facts["forwards"] += (
                f"; training takes those of {needed:,}, and the buffer is full when it ends. Without the others: write "
                'activations.source.refill = "needed"; the last batches are others then, drawn from fewer activations'
            )

    def _sae(self, rows: Batch, schedule: Any, evals: Mapping[str, Eval]) -> tuple[float, float, float | None]:
        """Seconds of its first weights, of a step, and of all evals; with what is seen in the first step."""
        config, world = in_step(self.config, self.world), self.world
        if self.options.d_in not in (None, self.ports.d_in):
            return 0.0, 0.0, None
        clock = Stopwatch()
        with clock():
            trainer = make_trainer(
                config,
                self.plugins,
                self.backend,
                self.corpus,
                self.options,
                self.ports,
                schedule,
                world=world.column,
            )
            give_weights(trainer, config, self.corpus, lambda: rows.activations, self.start)
        self.facts["SAE step"] = trainer.step_path()
        if world.features.size == 1:  # of a part, nothing is known of the whole
            self._first_step(trainer, rows)
        per_step = timed_steps(trainer, rows)
        return clock.seconds, per_step, self._measuring(trainer, evals)

    def _measuring(self, trainer: SAETrainer, evals: Mapping[str, Eval]) -> float | None:
        times = evals_of(self.config)
        if not times:
            return 0.0
        if self.world.size > 1 or not evals:
            return None
        contexts = self.corpus.held_out(self.backend, seed=0) if self.config.evals.reads_text else None
        with self.stream.model_lock:
            try:
                return times * timed_eval(self.config, trainer, self.backend, evals, contexts)
            except Exception as error:  # evals of plugins raise what they like, and the run itself goes on without
                self.warnings.append(f"evals could not be timed: {reason(error)}")
                return None

    def _first_step(self, trainer: SAETrainer, rows: Batch) -> None:
        """The features that no activation makes fire before anything is learned."""
        silent, share = silent_at_start(trainer, rows)
        d_sae, n = trainer.sae.d_sae, min(len(rows), trainer.training.train_batch_size_tokens)
        self.numbers["silent_at_start"] = silent
        self.facts["silent at start"] = f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens"
        if silent > d_sae / 2 and share > _FIRINGS:  # with fewer, chance alone leaves many out
            self.warnings.append(
                f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens, though a feature fires "
                f"{share:,.0f} times on average; many may stay dead. Start b_dec at the mean of activations "
                '(sae.b_dec_init_method = "mean"), or choose fewer features'
            )

    def _saving(self) -> float:
        """Seconds that are waited for the disk at the end; checkpoints before that are written behind the loop."""
        written = self.counted.saved + self.counted.numbers.get("checkpoint_bytes", 0.0)
        return timed_writing(self.config.checkpoints.folder, written)

    def _others(self) -> None:
        """Other backends of the same model, and other ways of this one."""
        if self.alone:
            tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(8).tokens)
            if found := told_of_others(self.config, self.plugins, self.backend, tokens):
                self.facts["other backends"] = "; ".join(found)
        if self.measure:
            rows = self.stream.rows_per_context(self.corpus.context_size)
            most = 4 * max(self.counted.rows_per_forward() // rows, 1)
            tokens = torch.from_numpy(self.corpus.contexts(self.backend).take(most).tokens)
            size = self.counted.numbers.get("forward_bytes", 0.0)
            with self.stream.model_lock:
                self.facts |= told_of_ways(
                    self.config, self.plugins, self.backend, tokens, size, rows=rows, alone=self.alone
                )
