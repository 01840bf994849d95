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

__all__ = ["ForwardStage", "Rehearsal", "Rehearsed", "part_added", "rehearsed"]

_BARREN = 16  # forwards without a token that counts, after which no more are looked at
_SECONDS = 4.0  # for batches in turns, and half of it for both at once, beside the first of each
_MOST = 24  # of them
_LONGEST = 1.5  # as much of a forward's time, at most, is added to the steps beside it: more is chance


class _Batches(Protocol):
    """Batches of rows of the run's sites."""

    def __next__(self) -> Batch: ...


class ForwardStage:
    """The forwards of a source, one after the other, of the stream that it would read itself."""

    def __init__(self, stream: StreamContext, source: SourceForwards) -> None:
        self._stream, self._contexts = stream.own, source.contexts
        self._model = ActivationStream(stream.own, source.contexts, device=source.device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for _ in range(_BARREN):
            with self._stream.model_lock:
                contexts = self._stream.contexts.take(self._contexts)
            if not len(contexts):
                raise StopIteration
            if len(batch := self._model.run(contexts)):
                synchronize(batch.activations[self._stream.sites[0]].device)
                return batch
        raise DataError(
            f"no token of {self._contexts * _BARREN} contexts one after the other counts "
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
    buffer: ShuffleBuffer | None
    """What forwards are mixed in; None: what is read are batches."""
    forward: int = 0
    """Rows in a forward, at most."""
    seconds: float = _SECONDS
    first: Callable[[Mapping[str, float | Histogram]], object] = lambda metrics: None
    """Is told of the first step's metrics."""
    given: list[float] = attrs.field(factory=list, init=False)
    """When the loop was given each batch, or would have been, of the last."""
    steps: list[float] = attrs.field(factory=list, init=False)
    """Seconds of each step, with what the loop does beside it."""
    made: list[float] = attrs.field(factory=list, init=False)
    """Seconds per row of the rows that were waited for, each time."""
    _ended: bool = attrs.field(default=False, init=False)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._batch()
        self.given.append(time.perf_counter())
        past = self.given[-1] - self.given[0] > self.seconds
        if len(self.steps) >= _MOST or (len(self.steps) >= 2 and past):
            raise StopIteration
        return batch

    def _batch(self) -> Batch:
        if self.buffer is None:
            return self._timed()
        wanted = min(self.trainer.training.train_batch_size_tokens, self.trainer.training.total_tokens)
        while self.buffer.filled + self.buffer.waiting < wanted and not self._ended:
            try:
                self.buffer.add(self._timed())
            except StopIteration:
                self._ended = True
        if self.buffer.waiting:
            self.buffer.shuffle()
        if self._ended and not self.steps and 0 < (n := self.buffer.filled) < wanted:
            return self.buffer.take(n).at(torch.arange(wanted) % n)  # there is no more text
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
    """The same when those features are dead that did not fire in the last step, where steps of the run have dead ones:
    an architecture may teach them by products of their own."""
    cold: float
    """What the first forward and the first step took beyond the others."""
    shared: float
    """How much of the time of a forward that is made while an SAE trains is added to that of its step."""
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


def rehearsed(
    rows: Any, trainer: SAETrainer, first: tuple[Batch, float], *, forward: int, ahead: bool, alone: float, look: Any
) -> Rehearsed:
    """What batches of ``rows`` (a :class:`ForwardStage`, or what reads them) and steps of ``trainer`` take.

    ``first`` are those rows that were there before there was an SAE, and how many seconds per row they took.
    ``forward``: rows of one forward at most; 0: what is read are whole batches.  ``ahead``: whether a thread makes
    forwards while steps are made, of which the part ``alone`` is added to them where that cannot be measured.
    ``look`` is told of the metrics of the first step.
    """
    batch = min(trainer.training.train_batch_size_tokens, trainer.training.total_tokens)

    def mixed() -> ShuffleBuffer | None:
        if not forward:
            return None
        found = first[0].activations
        return ShuffleBuffer(
            {site: values.shape[1] for site, values in found.items()},
            batch + forward,
            generator=torch.Generator().manual_seed(0),
            dtypes={site: values.dtype for site, values in found.items()},
            device=str(next(iter(found.values())).device),
        )

    turns = Rehearsal(rows, trainer, mixed(), forward, first=look)
    if turns.buffer is not None:
        turns.buffer.add(first[0])
    else:
        turns.rows = _Before(first[0], rows)
    turns.run()
    made, steps = turns.made if forward else turns.made[1:], turns.steps
    per_row = statistics.median(made or [first[1]])
    step = statistics.median(steps[1 : trainer.training.dead_after + 1] or steps[:1] or [0.0])
    cold = max((first[1] - per_row) * len(first[0]), 0.0) + max(max(steps[:1] or [0.0]) - step, 0.0)
    late = step
    shared, held = alone, 0 if turns.buffer is None else turns.buffer.nbytes
    turns.buffer = None
    if _let_die(trainer):
        later = Rehearsal(rows, trainer, mixed(), forward, seconds=_SECONDS / 2)
        later.run()
        late = statistics.median(later.steps[1:] or later.steps or [step])
    if ahead and not trainer.finished and step > 0:
        with contextlib.closing(Prefetched[Batch](rows, -(-batch // forward))) as prefetched:
            both = Rehearsal(prefetched, trainer, mixed(), forward, seconds=_SECONDS / 2)
            both.run()
        if (n := len(both.given) - 1) > 0:
            shared = part_added((both.given[-1] - both.given[0]) / n, late, per_row * batch)
    return Rehearsed(per_row=per_row, step=step, late=late, cold=cold, shared=shared, held=held)


def _let_die(trainer: SAETrainer) -> bool:
    """The features that did not fire in the last step are dead from here on; whether there are any, in a run that comes
    to have dead ones."""
    training, since = trainer.training, trainer.firing.since_fired
    silent = since > 0
    if trainer.finished or training.steps <= training.dead_after or not bool(silent.any()):
        return False
    since[silent] += training.dead_after
    return True


class _Before:
    """A batch that was read already, and then the others."""

    def __init__(self, batch: Batch, rows: _Batches) -> None:
        self._batch: Batch | None = batch
        self._rows = rows

    def __next__(self) -> Batch:
        batch, self._batch = self._batch, None
        return next(self._rows) if batch is None else batch
