"""A few batches of a run, by its own loop and as its source makes them: forwards and steps in turns, then both at once.

Timed each by itself, both are quicker than in a run, where each finds the caches full of the other's numbers.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from saekit.abilities import SourceForwards
from saekit.data import ActivationStream, Prefetched, ShuffleBuffer, StreamContext
from saekit.devices import synchronize
from saekit.errors import DataError, DivergedError
from saekit.site import Site
from saekit.training.loop import Lane, fit
from saekit.training.trainer import SAETrainer
from saekit.values import Batch, Histogram

__all__ = ["Deadline", "FirstRows", "ForwardStage", "Rehearsal", "Rehearsed", "part_added", "rehearsed"]

_LIMIT = 20.0  # seconds for all of it: what has begun is ended, and nothing else is begun
_SPARE = 2.0  # seconds that the first step may take, for another to be made when that time is over
_SECONDS = 4.0  # for batches in turns, and half of it for both at once, beside the first of each
_MOST = 24  # of them
_LONGEST = 1.5  # as much of a forward's time, at most, is added to the steps beside it: more is chance


class _Batches(Protocol):
    """Batches of rows of the run's sites."""

    def __next__(self) -> Batch: ...


class Deadline:
    """When a plan stops to time what a run does, from its making on."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = time.perf_counter() + (_LIMIT if seconds is None else seconds)

    @property
    def left(self) -> float:
        """Seconds; fewer than 0 when it has passed."""
        return self._end - time.perf_counter()

    @property
    def passed(self) -> bool:
        return self.left <= 0


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


@attrs.define(eq=False)
class Rehearsal:
    """What stands for a run's source, and looks on: it hands a few batches to the loop, and notes when."""

    rows: _Batches
    """Forwards, or what is read."""
    trainer: SAETrainer
    deadline: Deadline
    buffer: ShuffleBuffer | None
    """What forwards are mixed in; None: what is read are batches."""
    seconds: float
    first: Callable[[Mapping[str, float | Histogram]], object] = lambda metrics: None
    """Is told of the first step's metrics."""
    given: list[float] = attrs.field(factory=list, init=False)
    """When the loop was given each batch, or would have been, of the last."""
    steps: list[float] = attrs.field(factory=list, init=False)
    """Seconds of each step, with what the loop does beside it."""
    made: list[float] = attrs.field(factory=list, init=False)
    """Seconds per row of the rows that were waited for, each time."""
    cut: bool = attrs.field(default=False, init=False)
    """Whether the deadline passed while a batch was made, which then has rows more than once."""
    _tiled: Batch | None = attrs.field(default=None, init=False)
    _ended: bool = attrs.field(default=False, init=False)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._late():
            raise StopIteration
        batch = self._batch()
        self.given.append(time.perf_counter())
        past = self.given[-1] - self.given[0] > self.seconds
        if len(self.steps) >= _MOST or (len(self.steps) >= 2 and past) or self._late():
            raise StopIteration
        return batch

    def _late(self) -> bool:
        """Whether the time of all is over, and what there is will do; a first step that was short says little."""
        return self.deadline.passed and bool(self.steps) and (len(self.steps) >= 2 or self.steps[0] > _SPARE)

    def _batch(self) -> Batch:
        if self.buffer is None:
            return self._timed()
        if self.cut and self._tiled is not None:
            return self._tiled
        wanted = min(self.trainer.training.train_batch_size_tokens, self.trainer.training.total_tokens)
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
        if (self.cut or (self._ended and not self.steps)) and 0 < (n := self.buffer.filled) < wanted:
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
        if trainer.step == 1 and metrics:
            self.first(metrics)

    def after_batch(self) -> None:
        synchronize(self.trainer.device)
        self.steps.append(time.perf_counter() - self.given[-1])

    def run(self) -> None:
        """Until the time is over, or the run would be; :class:`DivergedError` as of the run."""
        fit([Lane(self, [self.trainer])], [self])
        if self.trainer.diverged is not None:
            raise DivergedError(self.trainer.diverged)

    # ---- what else a source has; no loop asks for it

    def peek(self) -> Mapping[Site, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@attrs.frozen(kw_only=True)
class Rehearsed:
    """Seconds of what a run does again and again."""

    per_row: float
    """Of a row that the model makes, or that is read, between steps."""
    step: float
    """Between forwards, with what the loop does."""
    late: float
    """The same when those features are dead that fired in no step before, where steps of the run have dead ones: an
    architecture may teach them by products of their own."""
    cold: float
    """What the first forward and the first step took beyond the others."""
    shared: float
    """How much of the time of a forward that is made while an SAE trains is added to that of its step."""
    forwards: int
    """How many were timed, or reads."""
    steps: int
    """How many were timed."""
    held: int = 0
    """Bytes of the rows that were mixed meanwhile."""

    def mean_step(self, steps: int, dead_after: int) -> float:
        """Seconds of the average of ``steps``, of which the first ``dead_after`` have no dead features."""
        early = min(steps, dead_after)
        return (early * self.step + (steps - early) * self.late) / max(steps, 1)


def part_added(together: float, step: float, forwards: float) -> float:
    """How much of the time of forwards beside steps is added to these: 0 where they share nothing, 1 where everything.

    ``together``: seconds of a batch with both at once, where by themselves a ``step`` and the ``forwards`` of a batch
    take as many.  Of forwards that take longer than the step, the rest is waited for in any case.
    """
    most = min(step, forwards)
    return min(max((together - step - max(forwards - step, 0.0)) / most, 0.0), _LONGEST) if most > 0 else 1.0


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
    look: Any,
    deadline: Deadline | None = None,
) -> Rehearsed:
    """What batches of ``rows`` (a :class:`ForwardStage`, or what reads them) and steps of ``trainer`` take.

    ``forward``: rows of one forward at most; 0: what is read are whole batches.  ``ahead``: whether a thread makes
    forwards while steps are made, of which the part ``alone`` is added to them where that cannot be measured.
    ``look`` is told of the metrics of the first step.  What would not end before the ``deadline`` is not begun.
    """
    deadline = deadline or Deadline()
    batch = min(trainer.training.train_batch_size_tokens, trainer.training.total_tokens)
    n = len(begun := first.given())
    mixed = _buffer_for(begun, batch + forward) if forward else None
    source = rows if mixed else _Before(begun, rows)
    turns = Rehearsal(source, trainer, deadline, mixed and mixed(), seconds=_SECONDS, first=look)
    if turns.buffer is not None:
        turns.buffer.add(begun)
    del begun
    turns.run()
    made, steps = turns.made if forward else turns.made[1:], turns.steps
    per_row = statistics.median(made or [first.per_row])
    step = statistics.median(steps[1 : trainer.training.dead_after + 1] or steps[:1] or [0.0])
    cold = max((first.per_row - per_row) * n, 0.0) + max(max(steps[:1] or [0.0]) - step, 0.0)
    held, forwards = 0 if turns.buffer is None else turns.buffer.nbytes, 1 + len(made)
    del turns  # with its rows
    late, shared = step, alone
    least = 2 * (batch * per_row + step)  # seconds of two batches, and no fewer say anything
    if deadline.left > least and _let_die(trainer):
        later = Rehearsal(rows, trainer, deadline, mixed and mixed(), seconds=_SECONDS / 2)
        later.run()
        late = statistics.median(later.steps[1:] or later.steps or [step])
        forwards += len(later.made)
        del later
    if ahead and mixed and not trainer.finished and step > 0 and deadline.left > least:
        with contextlib.closing(Prefetched[Batch](rows, -(-batch // forward))) as prefetched:
            both = Rehearsal(prefetched, trainer, deadline, mixed(), seconds=_SECONDS / 2)
            both.run()
        forwards += len(both.made)
        if (number := len(both.given) - 1) > 0 and not both.cut:
            shared = part_added((both.given[-1] - both.given[0]) / number, late, per_row * batch)
    return Rehearsed(
        per_row=per_row,
        step=step,
        late=late,
        cold=cold,
        shared=shared,
        forwards=forwards,
        steps=trainer.step,
        held=held,
    )


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
