"""A few batches of a run, by its own loop and as its source makes them: forwards and steps in turns, then both at once.

Timed each by itself, both are quicker than in a run, where each finds the caches full of the other's numbers.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from saekit.abilities import SourceForwards
from saekit.data import ActivationStream, Prefetched, ShuffleBuffer, StreamContext
from saekit.devices import synchronize
from saekit.errors import DataError, DivergedError
from saekit.planning.stepped import Rehearsed, Stepped, part_added
from saekit.site import Site
from saekit.training.loop import Lane, fit
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Histogram

__all__ = [
    "Deadline",
    "FirstRows",
    "ForwardStage",
    "Look",
    "Rehearsal",
    "rehearsed",
]

_LIMIT = 20.0  # seconds for all of it: what has begun is ended, and nothing else is begun
_SPARE = 2.0  # seconds that the first step may take, for another to be made when that time is over
_SECONDS = 4.0  # for batches in turns, and half of it for both at once, beside the first of each
_MOST = 24  # of them


class _Batches(Protocol):
    """Batches of rows of the run's sites."""

    def __next__(self) -> Batch: ...


class Deadline:
    """When a plan stops to time what a run does, from its making on."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = _LIMIT if seconds is None else seconds
        self._end = time.perf_counter() + self._seconds

    @property
    def left(self) -> float:
        """Seconds; fewer than 0 when it has passed."""
        return self._end - time.perf_counter()

    @property
    def passed(self) -> bool:
        return self.left <= 0

    @property
    def half_passed(self) -> bool:
        """Whether no more than half of the time is left."""
        return self.left <= self._seconds / 2


class ForwardStage:
    """The forwards of a source, one after the other, of the contexts of ``stream``."""

    def __init__(self, stream: StreamContext, source: SourceForwards, deadline: Deadline) -> None:
        self._stream, self._contexts, self._deadline = stream, source.contexts, deadline
        dtype = None if source.dtype is None else getattr(torch, source.dtype)
        self._model = ActivationStream(stream, source.contexts, device=source.device, dtype=dtype)
        stream.contexts.on_repeat = None  # how often the text is read, the plan has said of all of it

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        barren = 0
        while True:
            with self._stream.model_lock:
                contexts = self._stream.contexts.take(self._contexts)
            if not len(contexts):
                raise StopIteration
            if len(batch := self._model.run(contexts)):
                synchronize(batch.activations[self._stream.sites[0]].device)
                return batch
            barren += len(contexts)
            if self._deadline.passed:  # further on, some may count
                raise DataError(
                    f"no token of {barren} contexts one after the other counts "
                    "(tokens.exclude_special_tokens, tokens.seqpos_slice, tokens.mask_column)"
                )

    def state_dict(self) -> dict[str, Any]:
        """How far the text was read."""
        return self._model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self._model.load_state_dict(state)


Look = Callable[[Mapping[str, float | Histogram]], object]
"""Is told of the metrics of a first step."""


@attrs.define(eq=False)
class Rehearsal:
    """What hands a few batches to the loop, and notes when: of each, the trainers make their steps in turn."""

    rows: _Batches
    """Forwards, or what is read."""
    trainers: Sequence[SAETrainer]
    deadline: Deadline
    buffer: ShuffleBuffer | None
    """What forwards are mixed in; None: what is read are batches."""
    seconds: float
    looks: Sequence[Look] = ()
    """For each trainer, what is told of its first step."""
    given: list[float] = attrs.field(factory=list, init=False)
    """When the loop was given each batch, or would have been, of the last."""
    steps: list[list[float]] = attrs.field(init=False)
    """Seconds of the steps of each trainer, with what the loop does beside them."""
    made: list[float] = attrs.field(factory=list, init=False)
    """Seconds per row of the rows that were waited for, each time."""
    cut: bool = attrs.field(default=False, init=False)
    """Whether the deadline passed while a batch was made, which then has rows more than once."""
    _tiled: Batch | None = attrs.field(default=None, init=False)
    _ended: bool = attrs.field(default=False, init=False)
    _newest: Batch | None = attrs.field(default=None, init=False)
    _turn: tuple[int, float] = attrs.field(default=(0, 0.0), init=False)  # whose, and when it began

    def __attrs_post_init__(self) -> None:
        self.steps = [[] for _ in self.trainers]

    @property
    def rounds(self) -> list[float]:
        """Seconds of the steps of all trainers on each batch."""
        return [
            sum(own[number] for own in self.steps if number < len(own)) for number in range(max(map(len, self.steps)))
        ]

    def batch_for(self, number: int) -> Batch:
        """The next of the trainer of this number: one that others have had before it, or a new one."""
        if len(self.steps[number]) == len(self.given):
            self._newest = self._next()
        elif number and self.deadline.passed and self._enough(number):
            raise StopIteration  # the others of the round have theirs
        if self._newest is None:
            raise StopIteration  # those before it have had the last
        self._turn = number, time.perf_counter()
        return self._newest

    def _next(self) -> Batch:
        self._newest, rounds = None, self.rounds
        if self._late(rounds):
            raise StopIteration
        batch = self._batch()
        self.given.append(time.perf_counter())
        past = self.given[-1] - self.given[0] > self.seconds
        if len(rounds) >= _MOST or (len(rounds) >= 2 and past) or self._late(rounds):
            raise StopIteration
        return batch

    def _late(self, rounds: Sequence[float]) -> bool:
        """Whether the time of all is over, and what there is will do; a first step that was short says little.  Of
        several SAEs, no round is begun that would not end in time."""
        last = rounds[-1] if rounds and len(self.trainers) > 1 else 0.0
        return self.deadline.left <= last and bool(rounds) and (len(rounds) >= 2 or rounds[0] > _SPARE)

    def _enough(self, number: int) -> bool:
        """Whether what there is of the trainer of this number will do when the time is over: none is begun, and one
        more step is made after a first only where first steps were short."""
        firsts = [own[0] for own in self.steps if own]
        return len(self.steps[number]) != 1 or sum(firsts) > _SPARE

    def _batch(self) -> Batch:
        if self.buffer is None:
            return self._timed()
        if self.cut and self._tiled is not None:
            return self._tiled
        wanted = _rows_of(self.trainers)
        while (there := self.buffer.filled + self.buffer.waiting) < wanted and not self._ended:
            if there and self.deadline.passed:
                self.cut = True
                break
            try:
                self.buffer.add(self._timed())
            except StopIteration:
                self._ended = True
        if self.buffer.waiting:
            self.buffer.shuffle()
        if (self.cut or (self._ended and not self.rounds)) and 0 < (n := self.buffer.filled) < wanted:
            self._tiled = self.buffer.take(n).at(torch.arange(wanted) % n)  # there is no more text, or time
            return self._tiled
        if not self.buffer.filled:
            raise StopIteration
        return self.buffer.take(wanted)

    def _timed(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.rows)
        synchronize(next(iter(batch.activations.values())).device)
        self.made.append((time.perf_counter() - start) / len(batch))
        return batch

    def after_step(self, trainer: SAETrainer, metrics: dict[str, float | Histogram]) -> None:
        if trainer.step == 1 and metrics and self.looks:
            self.looks[self._turn[0]](metrics)

    def after_batch(self) -> None:
        number, begun = self._turn
        synchronize(self.trainers[number].device)
        self.steps[number].append(time.perf_counter() - begun)

    def run(self) -> None:
        """Until the time is over, or the run would be; :class:`DivergedError` as of the run, if all diverge."""
        fit([Lane(_Turn(self, number), [trainer]) for number, trainer in enumerate(self.trainers)], [self])
        if all(trainer.diverged is not None for trainer in self.trainers):
            whys = [one.diverged if len(self.trainers) == 1 else f"{one.name}: {one.diverged}" for one in self.trainers]
            raise DivergedError("; ".join(map(str, whys)))


@attrs.frozen(eq=False)
class _Turn:
    """What stands for the source of one of the trainers: the loop lets them step one after the other, each on batches
    that all have, and says when each is done."""

    rehearsal: Rehearsal
    number: int

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.rehearsal.batch_for(self.number)

    # ---- what else a source has; no loop asks for it

    def peek(self) -> Mapping[Site, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def _rows_of(trainers: Sequence[SAETrainer]) -> int:
    """Rows of a batch that is for all of them."""
    training = [trainer.training for trainer in trainers]
    return max(min(one.train_batch_size_tokens, one.total_tokens) for one in training)


@attrs.define
class FirstRows:
    """Those that were there before there was an SAE."""

    per_row: float
    """Seconds that one of them took."""
    batch: Batch | None

    def given(self) -> Batch:
        """The rows, which nothing here holds any longer."""
        batch, self.batch = self.batch, None
        assert batch is not None
        return batch


def rehearsed(
    rows: Any,
    trainer: SAETrainer,
    first: FirstRows,
    *,
    forward: int,
    ahead: bool,
    alone: float,
    look: Look,
    deadline: Deadline | None = None,
    beside: Sequence[tuple[SAETrainer, Look]] = (),
    share: float = 1.0,
) -> Rehearsed:
    """What batches of ``rows`` (a :class:`ForwardStage`, or what reads them) and steps of ``trainer`` take.

    ``forward``: rows of one forward at most; 0: what is read are whole batches.  ``ahead``: whether a thread makes
    forwards while steps are made, of which the part ``alone`` is added to them where that cannot be measured.
    ``look`` is told of the metrics of the first step.  What would not end before the ``deadline`` is not begun.
    Trainers ``beside`` it make their steps after it, on the same batches.  ``share``: of the seconds that there are for
    batches, as many are for these.
    """
    deadline, seconds = deadline or Deadline(), share * _SECONDS
    trainers, looks = [trainer, *(one for one, _ in beside)], [look, *(one for _, one in beside)]
    batch = _rows_of(trainers)
    n = len(begun := first.given())
    mixed = _buffer_for(begun, batch + forward) if forward else None
    source = rows if mixed else _Before(begun, rows)
    turns = Rehearsal(source, trainers, deadline, mixed and mixed(), seconds=seconds, looks=looks)
    if turns.buffer is not None:
        turns.buffer.add(begun)
    del begun
    turns.run()
    made = turns.made if forward else turns.made[1:]
    per_row = statistics.median(made or [first.per_row])
    steps = [_usual(own, one.training.dead_after) for one, own in zip(trainers, turns.steps, strict=True)]
    colds = [max(max(own[:1] or [0.0]) - usual, 0.0) for own, usual in zip(turns.steps, steps, strict=True)]
    held, forwards = 0 if turns.buffer is None else turns.buffer.nbytes, 1 + len(made)
    del turns  # with its rows
    lates, shared = list(steps), alone
    least = 2 * (batch * per_row + sum(steps))  # seconds of two batches, and no fewer say anything
    if deadline.left > least and any(dying := [_let_die(one) for one in trainers]):
        later = Rehearsal(rows, trainers, deadline, mixed and mixed(), seconds=seconds / 2)
        later.run()
        lates = [_late(*one) for one in zip(later.steps, steps, dying, strict=True)]
        forwards += len(later.made)
        del later
    working = [late for late, one in zip(lates, trainers, strict=True) if not one.finished]
    if ahead and mixed and sum(working) > 0 and deadline.left > least:
        with contextlib.closing(Prefetched[Batch](rows, -(-batch // forward))) as prefetched:
            both = Rehearsal(prefetched, trainers, deadline, mixed(), seconds=seconds / 2)
            both.run()
        forwards += len(both.made)
        if (number := len(both.given) - 1) > 0 and not both.cut:
            shared = part_added((both.given[-1] - both.given[0]) / number, sum(working), per_row * batch)
    own, *others = (
        Stepped(step=step, late=late, cold=cold, steps=one.step if one.diverged is None else 0)
        for step, late, cold, one in zip(steps, lates, colds, trainers, strict=True)
    )
    cold = max((first.per_row - per_row) * n, 0.0)
    return Rehearsed.of(own, per_row=per_row, cold=cold, shared=shared, forwards=forwards, held=held, beside=others)


def _late(later: Sequence[float], step: float, dies: bool) -> float:
    """Seconds of a step when features are dead, where some are."""
    return statistics.median(later[1:] or later or [step]) if dies else step


def _usual(steps: Sequence[float], dead_after: int) -> float:
    """Seconds of a step that is not the first, before features are dead."""
    return statistics.median(steps[1 : dead_after + 1] or steps[:1] or [0.0])


def _buffer_for(rows: Batch, capacity: int) -> Callable[[], ShuffleBuffer]:
    """Makes a buffer for so many rows that are as these."""
    kinds = {site: (values.shape[1], values.dtype) for site, values in rows.activations.items()}
    device = str(next(iter(rows.activations.values())).device)

    def made() -> ShuffleBuffer:
        return ShuffleBuffer(
            {site: width for site, (width, _) in kinds.items()},
            capacity,
            generator=torch.Generator().manual_seed(0),
            dtypes={site: dtype for site, (_, dtype) in kinds.items()},
            device=device,
        )

    return made


def _let_die(trainer: SAETrainer) -> bool:
    """The features that did not fire in any step are dead from here on; whether there are any, in a run that comes to
    have dead ones."""
    training, silent = trainer.training, trainer.firing.since_fired >= trainer.step
    if trainer.finished or training.steps <= training.dead_after or not bool(silent.any()):
        return False
    trainer.firing.put_dead(silent)
    return True


class _Before:
    """A batch that was read already, and then the others."""

    def __init__(self, batch: Batch, rows: _Batches) -> None:
        self._batch: Batch | None = batch
        self._rows = rows

    def __next__(self) -> Batch:
        batch, self._batch = self._batch, None
        return next(self._rows) if batch is None else batch
