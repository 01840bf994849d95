"""What evals of a planned run take: which SAEs are measured together, how often, and the seconds of some of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import attrs
from torch import Tensor

from saekit.config import TrainConfig
from saekit.data import Corpus
from saekit.planning.kinds import Kinds
from saekit.planning.lanes import PlannedLane
from saekit.planning.members import PlannedMember
from saekit.planning.rehearsal import Deadline
from saekit.planning.times import Measured, evals_of, timed_eval
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.reasons import reason
from saekit.runs.working_memory import resident_peak
from saekit.site import Sites

__all__ = ["EvalTimes", "Measurings", "measured_together", "measurings"]


@attrs.define(eq=False)
class Measurings:
    """Of some SAEs that are measured together."""

    members: Sequence[PlannedMember]
    number: int = 0
    before: int = 0
    """Of these, how many come before the last step of their lane."""


def measured_together(members: Collection[PlannedMember]) -> list[list[PlannedMember]]:
    """Those of ``members``, which are due at one time, that are measured in one pass: on the same contexts."""
    groups: dict[object, list[PlannedMember]] = {}
    for member in members:
        groups.setdefault(_contexts_of(member.config), []).append(member)
    return list(groups.values())


def _contexts_of(config: TrainConfig) -> object:
    evals = config.evals
    return evals.reads_text and (evals.n_contexts, config.training.seed, config.tokens.mask_column)


def measurings(lanes: Sequence[PlannedLane], here: Collection[PlannedMember]) -> list[Measurings]:
    """As a run makes them of those ``here``: in training of all of a lane that are due after the same step, and at the
    end of all that were not measured after their last."""
    found: dict[frozenset[str], Measurings] = {}
    own = [member for member in here if evals_of(member.config)]

    def note(due: Collection[PlannedMember], number: int, before: int) -> None:
        for group in measured_together(due):
            one = found.setdefault(frozenset(member.name for member in group), Measurings(group))
            one.number, one.before = one.number + number, one.before + before

    for lane in lanes:
        mine = [member for member in lane.members if member in own]
        last = max((member.config.training.steps for member in mine), default=0)
        for due, steps in _due(mine).items():
            note(due, len(steps), sum(step < last for step in steps))
    note([member for member in own if not _just_measured(member.config)], 1, 0)
    return sorted(found.values(), key=lambda one: -one.number * len(one.members))


def _just_measured(config: TrainConfig) -> bool:
    every = config.evals.every_n_steps
    return bool(every) and config.training.steps % every == 0


def _due(members: Sequence[PlannedMember]) -> dict[tuple[PlannedMember, ...], list[int]]:
    """Those that are due together in training, and after which steps."""
    rhythms: dict[tuple[int, int], list[PlannedMember]] = {}
    for member in members:
        if every := member.config.evals.every_n_steps:
            rhythms.setdefault((every, member.config.training.steps), []).append(member)
    found: dict[tuple[PlannedMember, ...], list[int]] = {}
    for step in sorted({step for every, steps in rhythms for step in range(every, steps + 1, every)}):
        due = [own for (every, steps), own in rhythms.items() if step % every == 0 and step <= steps]
        found.setdefault(tuple(member for own in due for member in own), []).append(step)
    return found


@attrs.define(eq=False)
class EvalTimes:
    """Times a few measurings, for all."""

    plugins: PluginManager
    corpus: Corpus
    backend: ModelBackend
    lanes: Sequence[PlannedLane]
    kinds: Kinds
    evals: Mapping[str, Mapping[str, Eval]]
    """By the names of the SAEs."""
    warn: Callable[[str], object]
    note: Callable[[float | None], None]
    """Is told how many bytes the process had at most."""
    estimated: int = attrs.field(default=0, init=False)
    """SAEs for whose measuring there was no time."""
    _known: dict[object, tuple[float, float]] = attrs.field(factory=dict, init=False)
    """Seconds of one measuring of those that are alike, and how much is measured."""
    _held_out: dict[object, Tensor] = attrs.field(factory=dict, init=False)
    _alike: dict[str, str] = attrs.field(factory=dict, init=False)
    _took: float = attrs.field(default=0.0, init=False)

    def seconds(self, here: Collection[PlannedMember], deadline: Deadline) -> tuple[float, float] | None:
        """Of all measurings of those ``here``, and of those before the last step; None where that cannot be told."""
        whole = before = 0.0
        # Those of which nothing was tried come last, since they are told by others.
        for one in sorted(measurings(self.lanes, here), key=lambda one: not any(self._asked(one.members))):
            if not all(self.evals[member.name] for member in one.members):
                return None
            found = self._of(one.members, deadline)
            if found is None:
                return None
            seconds, cold = found
            whole += one.number * seconds + cold
            before += one.before * seconds + cold * bool(one.before)
        return whole, before

    def _of(self, group: Sequence[PlannedMember], deadline: Deadline) -> tuple[float, float] | None:
        """Seconds of one measuring of ``group``, and what the first took beyond where it was timed for this."""
        for member in group:
            self._alike.setdefault(member.name, member.measured(self.plugins))
        alike = frozenset(Counter(self._alike[member.name] for member in group).items())
        much = float(sum(member.config.evals.n_contexts * len(member.config.evals.run) for member in group))
        if alike in self._known:
            return self._known[alike][0], 0.0
        if self._known and (deadline.left <= self._took or not any(self._asked(group))):
            seconds, other = min(self._known.values(), key=lambda one: max(one[1] / much, much / one[1]))
            self.estimated += len(group)
            return seconds * much / other, 0.0
        start = time.perf_counter()
        found = self._timed(group, deadline)
        self._took = time.perf_counter() - start
        if found is not None:
            self._known[alike] = found[0], much
        return found

    def _timed(self, group: Sequence[PlannedMember], deadline: Deadline) -> tuple[float, float] | None:
        asked = list(self._asked(group))
        if not asked:
            return None
        config, (trainer, _, own) = group[0].config, asked[0]
        contexts = self._contexts(config)
        given = config, trainer, self.backend, own, contexts, deadline.left, asked[1:]
        with self.lanes[0].stream.model_lock:
            try:
                (seconds, cold), peak = resident_peak(lambda: timed_eval(*given))
            except Exception as error:  # evals of plugins raise what they like, and the run itself goes on without
                self.warn(f"evals could not be timed: {reason(error)}")
                return None
        self.note(peak)
        return seconds * len(group) / len(asked), cold

    def _asked(self, group: Sequence[PlannedMember]) -> Iterator[Measured]:
        """Those that were tried stand for the others of their kind."""
        for member in group:
            for trainer in self.kinds.of(member).trainers[:1]:
                yield trainer, _sites_for(member, trainer.sites), self.evals[member.name]

    def _contexts(self, config: TrainConfig) -> Tensor | None:
        """What is held out, read once."""
        if not config.evals.reads_text:
            return None
        key = config.evals.n_contexts, config.tokens.mask_column
        if key not in self._held_out:
            corpus = attrs.evolve(self.corpus, evals=config.evals)
            self._held_out[key] = corpus.held_out(self.backend, seed=0)
        return self._held_out[key]


def _sites_for(member: PlannedMember, tried: Sites) -> Sites:
    """Where an SAE at the sites that were ``tried`` stands for ``member``: at its own, where each has one."""
    own = member.config.sites
    return own if len(own.inputs) == len(own.targets) == 1 else tried
