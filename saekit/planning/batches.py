"""What batches of all lanes of a plan take: forwards that several share are made once."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from saekit.distributed.world import World
from saekit.planning.lanes import PlannedLane
from saekit.planning.stepped import Rehearsed
from saekit.planning.times import Served, ran_ahead

__all__ = ["Batches"]

_MANY = 1.1  # as many forwards as training takes, to be worth a word


class Batches:
    """Of the lanes of a run."""

    def __init__(self, lanes: Sequence[PlannedLane], world: World) -> None:
        self._size = world.size
        leading: dict[object, PlannedLane] = {}
        for lane in lanes:
            other = leading.get(lane.forwards_alike)
            if other is None or _tokens(lane) > _tokens(other):
                leading[lane.forwards_alike] = lane
        self._leading = list(leading.values())
        """Of lanes that share forwards, the one that takes the most."""
        self._found: dict[object, Rehearsed] = {}

    def note(self, lane: PlannedLane, found: Rehearsed) -> None:
        """What batches of ``lane`` took."""
        self._found.setdefault(lane.timed_alike, found)

    def _of(self, lane: PlannedLane) -> Rehearsed:
        """As they were timed, or, where there was no time, those of another lane."""
        if (own := self._found.get(lane.timed_alike)) is not None:
            return own
        return max(self._found.values(), key=lambda one: one.per_row)

    @property
    def cold(self) -> float:
        """What the first forward took beyond the others."""
        return next(iter(self._found.values())).cold_forward

    @property
    def per_model_row(self) -> float | None:
        """Seconds for a row that the model makes; None: it does not run."""
        return max((self._of(lane).per_row for lane in self._leading if lane.reads), default=None)

    @property
    def timed_on(self) -> str:
        """In words."""
        made = "reads" if self.per_model_row is None else "forwards"
        return f"{sum(one.forwards for one in self._found.values()):,} {made}"

    def seconds(self, steps: float) -> tuple[float, float]:
        """Until there are first batches, and what batches add to steps that take so many seconds altogether."""
        filling = waiting = 0.0
        for lane in self._leading:
            number, found = lane.longest.config.training.steps, self._of(lane)
            first, added = ran_ahead(self._served(lane), self._batch(lane), number, found.per_row, steps / number)
            filling, waiting = filling + first, waiting + added
        return filling, waiting

    def _batch(self, lane: PlannedLane) -> int:
        return max(lane.longest.config.training.train_batch_size_tokens // self._size, 1)

    def _served(self, lane: PlannedLane) -> Served:
        batch = self._batch(lane)
        if not lane.reads:
            return Served(capacity=batch, forward=batch, ahead=False)
        source, forward = lane.counted.source, lane.rows_per_forward
        return Served(
            capacity=forward * source.buffered,
            forward=forward,
            ahead=source.ahead,
            shared=self._of(lane).shared,
            needed=source.needed,
        )

    def forwards_told(self) -> tuple[dict[str, str], dict[str, float]]:
        """How many there are, and how not to make those that training does not take, where that is many: facts and
        numbers."""
        lanes = [lane for lane in self._leading if lane.reads]
        if not lanes:
            return {}, {}
        made = [self._made(lane) for lane in lanes]
        needed = sum(self._made(lane, needed=True) for lane in lanes)
        texts = [f"{number:,} of {lane.rows_per_forward:,}" for lane, number in zip(lanes, made, strict=True)]
        text, line = f"{' and '.join(texts)} activations", lanes[0].counted.source.needed_line
        if line and sum(made) > _MANY * needed:
            text += (
                f"; training takes those of {needed:,}, and the buffer is full when it ends. Without the others: write "
                f"{line}; the last batches are others then, drawn from fewer activations"
            )
        return {"forwards": text}, {"forwards": sum(made)}

    def _made(self, lane: PlannedLane, *, needed: bool = False) -> int:
        served = self._served(lane)
        served = attrs.evolve(served, needed=True) if needed else served
        return served.forwards(self._batch(lane), lane.longest.config.training.steps)


def _tokens(lane: PlannedLane) -> int:
    return lane.longest.config.training.total_tokens
