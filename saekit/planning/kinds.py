"""The steps of all SAEs of a plan, from those of a few: of SAEs that are alike, two are tried for all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs

from saekit.errors import DataError
from saekit.planning.lanes import PlannedLane
from saekit.planning.members import PlannedMember
from saekit.planning.stepped import Stepped
from saekit.plugins.manager import PluginManager
from saekit.training.trainer import SAETrainer

__all__ = ["Kind", "Kinds"]

_OF_EACH = 2  # SAEs of a kind that are tried: what only the first of them takes is not taken for that of all


@attrs.define(eq=False)
class Kind:
    """SAEs that have the same sizes, and steps that take as long."""

    size: float
    """What is computed in a step: numbers of weights times rows."""
    members: list[PlannedMember] = attrs.field(factory=list)
    """Those that one process trains."""
    trainers: list[SAETrainer] = attrs.field(factory=list)
    """Those that were tried."""
    weights: list[float] = attrs.field(factory=list)
    """Seconds that the first weights of each took."""
    stepped: list[Stepped] = attrs.field(factory=list)
    """The steps of each."""
    estimated: bool = False
    """Whether they are taken from those of others."""

    @property
    def timed(self) -> list[Stepped]:
        """Of those that came to make a step."""
        return [one for one in self.stepped if one.steps]

    @property
    def step(self) -> float:
        """Seconds of one step of each."""
        return sum(one.step for one in self.timed) / len(self.timed) * len(self.members)

    @property
    def steps(self) -> float:
        """Seconds of all steps of all."""
        training = [member.config.training for member in self.members]
        return sum(
            one.mean_step(own.steps, own.dead_after) * own.steps for one in self.timed for own in training
        ) / len(self.timed)

    @property
    def cold(self) -> float:
        """What first steps took beyond the others: the first one tried makes what is made once, and only where there
        is a second is it known what each takes for itself."""
        colds = [] if self.estimated else [one.cold for one in self.timed]
        return sum(colds[:1]) + sum(colds[-1:]) * (len(self.members) - 1) * (len(colds) > 1)

    @property
    def first_weights(self) -> float:
        """Seconds until all have some."""
        return sum(self.weights[:1]) + sum(self.weights[-1:]) * (len(self.members) - 1)

    def as_others(self, other: Kind) -> None:
        """Take it that steps take as long as those of ``other``, by what is computed in them."""
        times, self.estimated = self.size / other.size, True
        self.weights = self.weights or [times * seconds for seconds in other.weights[-1:]]
        self.stepped = [attrs.evolve(one, step=times * one.step, late=times * one.late) for one in other.timed]


class Kinds:
    """Of all SAEs of a run, those ``here`` count."""

    def __init__(self, lanes: Sequence[PlannedLane], here: Collection[PlannedMember], plugins: PluginManager) -> None:
        self._of: dict[str, Kind] = {}
        by_key: dict[str, Kind] = {}
        self._seen: dict[object, None] = {}
        names = {member.name for member in here}
        for lane in lanes:
            for member in lane.members:
                size = member.weights * member.config.training.train_batch_size_tokens
                kind = by_key.setdefault(member.kind(plugins), Kind(size))
                kind.members += [member] * (member.name in names)
                self._of[member.name] = kind
        self.all = [kind for kind in by_key.values() if kind.members]

    def of(self, member: PlannedMember) -> Kind:
        """The one that it is of."""
        return self._of[member.name]

    def to_try(self, lane: PlannedLane) -> list[PlannedMember]:
        """Of ``lane``, those that are tried, if no others were that they are like, and no such batches were made: of
        each kind one, and then another of each."""
        kinds: dict[int, list[PlannedMember]] = {}
        here = [member for member in lane.members if member in self.of(member).members]
        for member in here:
            if not (kind := self.of(member)).trainers:
                kinds.setdefault(id(kind), []).append(member)
        chosen = [own[number] for number in range(_OF_EACH) for own in kinds.values() if number < len(own)]
        if not chosen and lane.timed_alike not in self._seen:
            chosen = [*here, *lane.members][:1]
        return chosen

    def lanes_to_try(self, lanes: Sequence[PlannedLane]) -> int:
        """About how many of ``lanes`` say something new: those with a kind of SAE, or batches, that none before has."""
        seen: dict[object, None] = {}
        found = 0
        for lane in lanes:
            own = [lane.timed_alike, *(id(kind) for one in lane.members if (kind := self.of(one)) in self.all)]
            found += any(one not in seen for one in own)
            seen |= dict.fromkeys(own)
        return max(found, 1)

    def note(self, lane: PlannedLane, found: Mapping[str, tuple[SAETrainer, float, Stepped]]) -> None:
        """What came of those of ``lane``, by name: with the seconds that their first weights took."""
        self._seen[lane.timed_alike] = None
        for member in lane.members:
            if member.name in found:
                kind, (trainer, weights, stepped) = self.of(member), found[member.name]
                kind.trainers.append(trainer)
                kind.weights.append(weights)
                kind.stepped.append(stepped)

    def estimate(self) -> int:
        """Take those for which there was no time from the one that is nearest in size; how many SAEs these are."""
        timed = [kind for kind in self.all if kind.timed]
        left = [kind for kind in self.all if not kind.timed]
        if not timed:
            raise DataError("there are too few activations for a step; is there more text?")
        for kind in left:
            size = kind.size
            kind.as_others(min(timed, key=lambda one: max(one.size / size, size / one.size)))
        return sum(len(kind.members) for kind in left)

    def timed_on(self, saes: int, estimated: int) -> str:
        """In words, of so many ``saes``, of which the steps of so many are ``estimated``."""
        timed = [one for kind in self.all for one in kind.stepped if one.steps and not kind.estimated]
        steps = sum(one.steps for one in timed)
        text = f"{steps:,} step{'s' * (steps != 1)}"
        if saes > 1:
            text += f" of {len(timed)} of {saes} SAEs" if len(timed) < saes else f" of all {saes} SAEs"
        if estimated:
            text += f"; steps of {estimated} more, which were not timed, by how much they compute"
        return text
