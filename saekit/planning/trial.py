"""SAEs of one lane in training, for a few batches of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch

from saekit.data import Corpus
from saekit.distributed.world import World
from saekit.planning.lanes import PlannedLane
from saekit.planning.members import PlannedMember
from saekit.planning.mesh import in_step
from saekit.planning.rehearsal import Deadline, FirstRows, Look, rehearsed
from saekit.planning.stepped import Rehearsed, Stepped
from saekit.planning.times import Stopwatch
from saekit.plugins.manager import PluginManager
from saekit.protocols import ModelBackend
from saekit.runs.setup import give_weights, make_trainer
from saekit.training.schedule import ComposedSchedule
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["Trial"]

_FIRINGS = 10.0  # of the average feature in the first step, for silence to mean something


@attrs.define(eq=False)
class Trial:
    """A few batches of ``lane``, and what they say."""

    lane: PlannedLane
    plugins: PluginManager
    world: World
    corpus: Corpus
    backend: ModelBackend
    trainers: list[SAETrainer] = attrs.field(factory=list, init=False)
    weights: list[float] = attrs.field(factory=list, init=False)
    """Seconds that the first weights of each took."""
    paths: dict[str, str] = attrs.field(factory=dict, init=False)
    """How steps are made, by the names of the SAEs, in words."""
    logged: Mapping[str, float | Histogram] = attrs.field(factory=dict, init=False)
    """Metrics of the first step of one of them."""
    silent: dict[str, int] = attrs.field(factory=dict, init=False)
    """Features that no activation makes fire before anything is learned."""
    silent_texts: dict[str, str] = attrs.field(factory=dict, init=False)
    doubts: list[tuple[str, str]] = attrs.field(factory=list, init=False)
    """What looks wrong, of which SAE."""

    def begin(
        self,
        first: FirstRows,
        members: Sequence[PlannedMember],
        schedules: Mapping[str, ComposedSchedule],
        about: Callable[[PlannedMember], AbstractContextManager[None]],
        deadline: Deadline,
    ) -> list[SAETrainer]:
        """SAEs in training with their first weights, which may look at the ``first`` rows.

        ``about`` surrounds what is done for one of them.  No further one is begun when half of the time is over: the
        other half is for their steps.
        """
        batch = first.batch
        assert batch is not None
        for member in members:
            if self.trainers and deadline.half_passed:
                break
            config, clock, ports = in_step(member.config, self.world), Stopwatch(), member.ports
            assert ports is not None
            with about(member), clock():
                trainer = make_trainer(
                    config,
                    self.plugins,
                    self.backend,
                    self.corpus,
                    member.options,
                    ports,
                    schedules[member.name],
                    member.name,
                    self.world.column,
                ).in_turns(self.lane.stream.model_lock)  # as in a run, where forwards and steps of another precision
                give_weights(trainer, config, self.corpus, lambda: batch.activations, member.start)
            self.trainers.append(trainer)
            self.weights.append(clock.seconds)
            self.paths[member.name] = trainer.step_path()
        return self.trainers

    def rehearse(self, rows: Any, first: FirstRows, deadline: Deadline, share: float) -> Rehearsed:
        """A few batches, as the loop makes them; of the time for all, these have a ``share``."""
        lane, (trainer, *others) = self.lane, self.trainers
        beside = torch.device(self.backend.device) != torch.device(trainer.device)  # and so nothing is shared
        return rehearsed(
            rows,
            trainer,
            first,
            forward=lane.rows_per_forward if lane.reads else 0,
            ahead=lane.reads and lane.counted.source.ahead,
            alone=0.0 if beside else 1.0,
            look=self._look(trainer),
            deadline=deadline,
            beside=[(other, self._look(other)) for other in others],
            share=share,
        )

    def tried(self, found: Rehearsed) -> dict[str, tuple[SAETrainer, float, Stepped]]:
        """By the names of the SAEs: each, the seconds of its first weights, and its steps; but for those that
        diverged."""
        steps = [found.own, *found.beside]
        return {
            trainer.name: (trainer, seconds, own)
            for trainer, seconds, own in zip(self.trainers, self.weights, steps, strict=True)
            if trainer.diverged is None
        }

    def diverged(self) -> dict[str, str]:
        """By their names, why those diverged that did."""
        return {one.name: one.diverged for one in self.trainers if one.diverged is not None}

    def _look(self, trainer: SAETrainer) -> Look:
        def look(metrics: Mapping[str, float | Histogram]) -> None:
            self.logged = self.logged or metrics
            if self.world.features.size == 1:  # of a part, nothing is known of the whole
                self._first_step(trainer, metrics)

        return look

    def _first_step(self, trainer: SAETrainer, metrics: Mapping[str, float | Histogram]) -> None:
        silent = int((trainer.firing.since_fired > 0).sum())
        d_sae, n = trainer.sae.d_sae, trainer.tokens
        share = float(metrics["metrics/l0"]) * n / d_sae  # type: ignore[arg-type]  # how often the average one fires
        self.silent[trainer.name] = silent
        text = f"{silent:,} of {d_sae:,} features fire on none of the first {n:,} tokens"
        self.silent_texts[trainer.name] = text
        if silent > d_sae / 2 and share > _FIRINGS:  # with fewer, chance alone leaves many out
            advice = (
                f"{text}, though a feature fires {share:,.0f} times on average; many may stay dead. Start b_dec at the "
                "mean of activations (sae.b_dec_init_method=mean), or choose fewer features"
            )
            self.doubts.append((trainer.name, advice))
