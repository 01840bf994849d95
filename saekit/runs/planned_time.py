"""How long a run takes and when its first step is done, from short timings of everything that it does."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.evals.calling import Asked, all_called
from saekit.files.tensors import save_tensors
from saekit.protocols import Eval, ModelBackend
from saekit.runs.planned_memory import standing_place
from saekit.runs.randomness import seeded
from saekit.runs.timing import duration_text
from saekit.training.metrics import weight_metrics
from saekit.training.trainer import SAETrainer

__all__ = ["Served", "Stopwatch", "Times", "evals_of", "ran_ahead", "timed_eval", "timed_writing"]

_FEW = 8  # contexts that an eval is timed on
_WRITTEN = 1 << 26  # bytes that writing is timed with, at most
_BATCHES = 20_000  # after which the rest of a run is as what came before


@attrs.define
class Stopwatch:
    """Seconds of pieces of work, together."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Counts what is done meanwhile, whatever comes of it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


@attrs.frozen(kw_only=True)
class Times:
    """Seconds of what a run does, in its order."""

    opening: float
    """Imports, the model, the text, what is held out."""
    filling: float
    """Until there is a first batch."""
    weights: float = 0.0
    """Those that the SAE starts with."""
    forwards: float
    """What forwards add after the first batch: while steps wait for them, and while both share the processors."""
    steps: float
    step: float
    """One of them."""
    evals: float | None
    """None: not known."""
    saving: float

    @property
    def first(self) -> float:
        """The end of the first step, from the beginning of the run."""
        return self.opening + self.filling + self.weights + self.step

    @property
    def end(self) -> float:
        """Of the run."""
        return self.last + (self.evals or 0.0) + self.saving

    @property
    def last(self) -> float:
        """The end of the last step, as if all evals came after it."""
        return self.opening + self.filling + self.weights + self.forwards + self.steps

    def numbers(self) -> dict[str, float]:
        """By name."""
        return {
            "opening_seconds": self.opening,
            "filling_seconds": self.filling,
            "forward_seconds": self.filling + self.forwards,
            "step_seconds": self.steps,
            **({} if self.evals is None else {"eval_seconds": self.evals}),
            "saving_seconds": self.weights + self.saving,
            "first_step_seconds": self.first,
            "last_step_seconds": self.last,
            "seconds": self.end,
        }

    def text(self, what: str, *, messages: bool) -> str:
        """For people; ``what`` gives the batches, and processes send ``messages``, which are not counted."""
        parts = [f"opening {duration_text(self.opening)}"]
        parts += [f"{what} {duration_text(self.filling + self.forwards)}", f"the SAE {duration_text(self.steps)}"]
        if self.evals:
            parts.append(f"evals {duration_text(self.evals)}")
        parts.append(f"weights and saving {duration_text(self.weights + self.saving)}")
        left = ["messages"] * messages + ["evals"] * (self.evals is None)
        missing = f"; {' and '.join(left)} not counted" if left else ""
        return (
            f"about {duration_text(self.end)}, the first step after {duration_text(self.first)}: {', '.join(parts)}"
            f"{missing}"
        )


@attrs.frozen(kw_only=True)
class Served:
    """Where batches come from: a buffer that is refilled when less than half of it is left."""

    capacity: int
    """Rows in it."""
    forward: int
    """Rows of one forward."""
    ahead: bool
    """Whether forwards are made while steps are."""
    beside: bool
    """Whether these take nothing away from the steps, as on two devices."""
    needed: bool = False
    """Whether it is filled up to no more rows than are still to be taken."""

    def forwards(self, batch: int, batches: int) -> int:
        """How many the model makes for so many ``batches`` of ``batch`` rows."""
        alone = attrs.evolve(self, ahead=False)
        return round(sum(ran_ahead(alone, batch, batches, per_row=1.0, per_step=0.0)) / self.forward)


def ran_ahead(served: Served, batch: int, batches: int, per_row: float, per_step: float) -> tuple[float, float]:
    """Seconds until the first batch is there, and what forwards add to the steps after that.

    A thread that runs the model while an SAE trains shares the processors with it: both then take as much longer.
    """
    size, most = served.forward, -(-batch // served.forward) * served.forward  # most: that lie ready, taken by nobody
    lacking: float = batch * batches if served.needed else 1 << 62
    filled: float = min(served.capacity, -(-lacking // size) * size)
    filling, free, waiting, added = filled * per_row, served.capacity - filled, 0.0, 0.0
    lacking -= filled
    for _ in range(min(batches, _BATCHES)):
        if filled < max(batch, served.capacity // 2):
            made = min(free // size, max(-(-lacking // size), 0)) * size
            added += made * per_row
            filled, free, lacking, waiting = filled + waiting + made, free - made, lacking - made, 0.0
        taken = min(batch, filled)
        filled, free = filled - taken, free + taken
        if served.ahead:
            made = min(free, most, per_step / per_row, max(lacking, 0))
            free, waiting, lacking = free - made, waiting + made, lacking - made
            added += 0.0 if served.beside else made * per_row
    return filling, added * max(batches, 1) / max(min(batches, _BATCHES), 1)


def evals_of(config: TrainConfig) -> int:
    """How many times a run measures."""
    every, steps = config.evals.every_n_steps, config.training.steps
    if not config.evals.run:
        return 0
    return steps // every + bool(steps % every) if every else 1


def timed_eval(
    config: TrainConfig, trainer: SAETrainer, backend: ModelBackend, evals: Mapping[str, Eval], contexts: Tensor | None
) -> float:
    """Seconds of one measuring, by that of a few contexts; raises what evals raise."""
    few = None if contexts is None else contexts[:_FEW]
    weights, measured = Stopwatch(), Stopwatch()
    try:
        with seeded(config.training.seed):
            with weights():
                sae = trainer.raw_sae()
                weight_metrics(sae)
            with measured():
                all_called([Asked(sae, config.sites, evals)], backend=backend, contexts=few)
    finally:
        for parameter in trainer.sae.parameters():
            parameter.grad = None
    times = 1.0 if contexts is None or few is None or not len(few) else len(contexts) / len(few)
    return weights.seconds + times * measured.seconds


def timed_writing(folder: str, size: float) -> float:
    """Seconds to write so many bytes and their checksum where ``folder`` is, or would be made; nothing stays there."""
    # Random, since a file system may pack what is not; of the system, so that torch's numbers stay as they are.
    some = torch.frombuffer(bytearray(os.urandom(int(min(max(size, 1), _WRITTEN)))), dtype=torch.uint8)
    try:
        with tempfile.TemporaryDirectory(dir=standing_place(folder)) as temporary:
            start = time.perf_counter()
            save_tensors(Path(temporary) / "written", {"some": some})
            took = time.perf_counter() - start
    except OSError:  # whether a run may write there is found out elsewhere
        return 0.0
    return took * size / len(some)
