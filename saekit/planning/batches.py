"""What batches of all lanes of a plan take: forwards that several share are made once."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from saekit.data.shared import MOST_KEPT
from saekit.distributed.world import World
from saekit.planning.lanes import PlannedLane
from saekit.planning.stepped import Rehearsed
from saekit.planning.times import Served, ran_ahead
from saekit.runs.timing import bytes_text

__all__ = ["Batches"]

_MANY = 1.1  # as many forwards as training takes, to be worth a word


class Batches:
    """Of the lanes of a run."""

    def __init__(self, lanes: Sequence[PlannedLane], world: World, forward_bytes: float = 0.0) -> None:
        """``forward_bytes``: what hooks hold of one context for all of ``lanes``."""
        # Where SAEs are laid out over processes, each takes whole batches, and makes its part of the forwards.
        self._size, self._readers, self._bytes = world.column.size, world.saes.size, forward_bytes
        groups: dict[object, list[PlannedLane]] = {}
        for lane in lanes:
            groups.setdefault(lane.forwards_alike, []).append(lane)
        self._groups = list(groups.values())
        """Lanes that share forwards."""
        self._found: dict[object, tuple[PlannedLane, Rehearsed]] = {}

    def note(self, lane: PlannedLane, found: Rehearsed) -> None:
        """What batches of ``lane`` took."""
        self._found.setdefault(lane.timed_alike, (lane, found))

    @property
    def noted(self) -> bool:
        return bool(self._found)

    def _of(self, lane: PlannedLane) -> Rehearsed:
        """As they were timed, or, where there was no time, as those of another lane: a context takes the model as long,
        however many of its rows count."""
        if (own := self._found.get(lane.timed_alike)) is not None:
            return own[1]
        alike = [one for one in self._found.values() if one[0].reads == lane.reads] or [*self._found.values()]
        other, found = max(alike, key=lambda one: one[1].per_row * one[0].rows_per_context)
        return attrs.evolve(found, per_row=found.per_row * other.rows_per_context / lane.rows_per_context)

    @property
    def cold(self) -> float:
        """What the first forward took beyond the others."""
        return next(found.cold_forward for _, found in self._found.values())

    @property
    def runs_model(self) -> bool:
        return any(lane.reads for group in self._groups for lane in group)

    def per_forward(self, lane: PlannedLane) -> float:
        """Seconds of one that the model makes for ``lane``."""
        return self._of(lane).per_row * lane.rows_per_forward

    @property
    def timed_on(self) -> str:
        """In words."""
        made = "forwards" if self.runs_model else "reads"
        return f"{sum(found.forwards for _, found in self._found.values()):,} {made}"

    def seconds(self, steps: float) -> tuple[float, float]:
        """Until there are first batches, and what batches add to steps that take so many seconds altogether."""
        filling = waiting = 0.0
        for group in self._groups:
            firsts, wholes = [], []
            for lane in group:
                number, per_row = lane.longest.config.training.steps, self._of(lane).per_row / self._readers_of(lane)
                first, added = ran_ahead(self._served(lane), self._batch(lane), number, per_row, steps / number)
                firsts.append(first)
                wholes.append(first + added)
            filling, waiting = filling + max(firsts), waiting + max(wholes) - max(firsts)
            waiting += self._again(group) * max(self.per_forward(lane) for lane in group)
        return filling, waiting

    def _again(self, group: Sequence[PlannedLane]) -> int:
        """Forwards of ``group`` that are made more than once, as more would have to wait for other lanes than are kept.

        The lane that comes to them first runs ahead by what fills its buffer, later by half of that; the oldest are
        kept.
        """
        lead = max(group, key=self._made)
        if len(group) < 2 or not lead.reads or not self._bytes:
            return 0
        room = int(MOST_KEPT / (self._bytes * lead.counted.source.contexts))
        ahead, again = lead.forwards_at_once, 0
        refill = max(ahead - lead.counted.source.buffered // 2, 1)
        for lane in group:
            if lane is not lead:
                first = min(ahead, made := self._made(lane))
                again += max(first - room, 0) + int((made - first) * max(1 - room / refill, 0.0))
        return again

    def _readers_of(self, lane: PlannedLane) -> int:
        """Over how many processes its forwards are dealt out; what is read, each reads."""
        return self._readers if lane.reads else 1

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
        groups = [group for group in self._groups if group[0].reads]
        if not groups:
            return {}, {}
        lanes = [max(group, key=self._made) for group in groups]
        made = [self._made(lane) for lane in lanes]
        needed = sum(max(self._made(lane, needed=True) for lane in group) for group in groups)
        texts = [f"{number:,} of {lane.rows_per_forward:,}" for lane, number in zip(lanes, made, strict=True)]
        text, line = f"{' and '.join(texts)} activations", lanes[0].counted.source.needed_line
        if again := sum(self._again(group) for group in groups):
            text += (
                f", and about {again:,} again, since no more than {bytes_text(MOST_KEPT)} of them wait for other SAEs "
                "(give SAEs the same seed, batch size and activations.source, or lower "
                "activations.source.n_batches_in_buffer)"
            )
        if line and sum(made) > _MANY * needed:
            text += (
                f"; training takes those of {needed:,}, and the buffer is full when it ends. Without the others: write "
                f"{line}; the last batches are others then, drawn from fewer activations"
            )
        return {"forwards": text}, {"forwards": sum(made) + again}

    def _made(self, lane: PlannedLane, *, needed: bool = False) -> int:
        served = self._served(lane)
        served = attrs.evolve(served, needed=True) if needed else served
        made = served.forwards(self._batch(lane), lane.longest.config.training.steps)
        return -(-made // self._readers_of(lane))
