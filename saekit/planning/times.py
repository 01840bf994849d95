"""How long a run takes and when its first step is done, from short timings of everything that it does."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.evals.calling import Asked, all_called
from saekit.files.tensors import save_tensors
from saekit.planning.memory import standing_place
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.reports.folder import read_run
from saekit.reports.pictures import pictures_after
from saekit.runs.randomness import seeded
from saekit.runs.record import RunRecord
from saekit.runs.timing import duration_text
from saekit.sae.module import SAEModule
from saekit.site import Sites
from saekit.training.metrics import weight_metrics
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = [
    "Measured", "Served", "Stopwatch", "Times", "evals_of", "ran_ahead", "timed_copy", "timed_eval", "timed_pictures",
    "timed_writing",
]  # fmt: skip

_FEW = 4  # contexts that an eval is timed on first
_SECONDS = 3.0  # for which it is timed on more
_WRITTEN = 1 << 26  # bytes that writing is timed with, at most
_LOGGED = 20_000  # records, at most, that pictures are timed with
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
    cold: float = 0.0
    """What the first forward and the first step take beyond the others."""
    copies: float = 0.0
    """For which checkpoints hold up the steps."""
    evals: float | None
    """None: not known."""
    evals_before: float = 0.0
    """Of these, those of evals that come before the last step."""
    saving: float
    pictures: float | None = 0.0
    """For those that are drawn when all else is done; None: not known."""

    @property
    def first(self) -> float:
        """The end of the first step of each SAE, from the beginning of the run."""
        return self.opening + self.filling + self.weights + self.cold + self.step

    @property
    def end(self) -> float:
        """Of the run."""
        return self.last + (self.evals or 0.0) - self.evals_before + self.saving + (self.pictures or 0.0)

    @property
    def last(self) -> float:
        """The end of the last step."""
        before = self.opening + self.filling + self.weights + self.cold
        return before + self.forwards + self.steps + self.copies + self.evals_before

    def numbers(self) -> dict[str, float]:
        """By name."""
        return {
            "opening_seconds": self.opening,
            "filling_seconds": self.filling,
            "forward_seconds": self.filling + self.forwards,
            "step_seconds": self.cold + self.steps,
            **({} if self.evals is None else {"eval_seconds": self.evals}),
            "saving_seconds": self.weights + self.copies + self.saving,
            **({} if self.pictures is None else {"picture_seconds": self.pictures}),
            "first_step_seconds": self.first,
            "last_step_seconds": self.last,
            "seconds": self.end,
        }

    def text(self, what: str, *, messages: bool, on: str = "", several: bool = False) -> str:
        """For people; ``what`` gives the batches, and processes send ``messages``, which are not counted.

        ``on``: what it was timed on; ``several``: there are more SAEs than one.
        """
        parts = [f"opening {duration_text(self.opening)}"]
        parts.append(f"{what} {duration_text(self.filling + self.forwards)}")
        parts.append(f"the SAE{'s' * several} {duration_text(self.cold + self.steps)}")
        if self.evals:
            parts.append(f"evals {duration_text(self.evals)}")
        parts.append(f"weights and saving {duration_text(self.weights + self.copies + self.saving)}")
        if self.pictures:
            parts.append(f"pictures {duration_text(self.pictures)}")
        left = ["messages"] * messages + ["evals"] * (self.evals is None) + ["pictures"] * (self.pictures is None)
        missing = f"; {' and '.join(left)} not counted" if left else ""
        return (
            f"about {duration_text(self.end)}, the first step after {duration_text(self.first)}: {', '.join(parts)}"
            f"{f'; {on}' if on else ''}{missing}"
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
    shared: float = 1.0
    """How much of the time of such a forward is added to the steps: 1 where both need all of the processors, 0 where
    they share nothing, as on two devices."""
    needed: bool = False
    """Whether it is filled up to no more rows than are still to be taken."""

    def forwards(self, batch: int, batches: int) -> int:
        """How many the model makes for so many ``batches`` of ``batch`` rows."""
        alone = attrs.evolve(self, ahead=False)
        return round(sum(ran_ahead(alone, batch, batches, per_row=1.0, per_step=0.0)) / self.forward)


def ran_ahead(served: Served, batch: int, batches: int, per_row: float, per_step: float) -> tuple[float, float]:
    """Seconds until the first batch is there, and what forwards add to the steps after that.

    A thread that runs the model while an SAE trains may share the processors with it: both then take longer.
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
            added += served.shared * made * per_row
    return filling, added * max(batches, 1) / max(min(batches, _BATCHES), 1)


def evals_of(config: TrainConfig) -> int:
    """How many times a run measures."""
    every, steps = config.evals.every_n_steps, config.training.steps
    if not config.evals.run:
        return 0
    return steps // every + bool(steps % every) if every else 1


Measured: TypeAlias = tuple[SAETrainer, Sites, Mapping[str, Eval]]
"""An SAE, where it is measured, and by what."""


def timed_eval(
    config: TrainConfig,
    trainer: SAETrainer,
    backend: ModelBackend,
    evals: Mapping[str, Eval],
    contexts: Tensor | None,
    left: float = 0.0,
    beside: Sequence[Measured] = (),
) -> tuple[float, float]:
    """Seconds of one measuring, by that of some contexts, and what the first takes beyond; raises what evals raise.

    What is ``beside`` is measured with it, which may be the same SAE again for another like it.  The first measuring
    makes what the others find there; it is all that is told by where it takes more seconds than there are ``left``, or
    three.
    """
    every, asked, weights = [(trainer, config.sites, evals), *beside], list[Asked](), 0.0

    def measured(some: Tensor | None) -> float:
        clock = Stopwatch()
        with clock():
            all_called(asked, backend=backend, contexts=some)
        return clock.seconds

    whole = 0 if contexts is None else len(contexts)
    few = None if contexts is None else contexts[:_FEW]
    times = whole / len(few) if few is not None and len(few) else 1.0
    try:
        with seeded(config.training.seed):
            known: dict[int, tuple[SAEModule, float]] = {}
            for one, sites, own in every:
                if id(one) not in known:
                    known[id(one)] = _weights_of(one)
                sae, seconds = known[id(one)]
                asked.append(Asked(sae, sites, own))
                weights += seconds
            first = measured(few)
            if first > max(left, _SECONDS):
                return weights + times * first, 0.0
            again = measured(few)
            seconds, most = times * again, min(int(_FEW * _SECONDS / max(again, 1e-9)) // _FEW * _FEW, whole)
            if contexts is not None and most > _FEW:
                seconds = whole * measured(contexts[:most]) / most
    finally:
        for one, _, _ in every:
            for parameter in one.sae.parameters():
                parameter.grad = None
    return weights + seconds, max(first - again, 0.0)


def _weights_of(trainer: SAETrainer) -> tuple[SAEModule, float]:
    """The SAE as it is measured, and the seconds that this and what is logged of its weights take."""
    clock = Stopwatch()
    with clock():
        sae = trainer.raw_sae()
        weight_metrics(sae)
    return sae, clock.seconds


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


def timed_copy(size: float) -> float:
    """Seconds to copy so many bytes in memory, as a checkpoint is before it is written."""
    some = torch.ones(int(min(max(size, 1), _WRITTEN)), dtype=torch.uint8)
    clock = Stopwatch()
    with clock():
        some.clone()
    return clock.seconds * size / len(some)


def _logged(value: float | Histogram) -> Any:
    """``value`` as a run logs it: JSON has no nan."""
    if isinstance(value, Histogram):
        return {"counts": list(value.counts), "edges": [_logged(edge) for edge in value.edges]}
    return value if math.isfinite(value) else None


def timed_pictures(config: TrainConfig, plugins: PluginManager, metrics: Mapping[str, float | Histogram]) -> float:
    """Seconds to draw the pictures of a run that has logged such ``metrics`` as often as this one will.

    It is drawn in a temporary folder, of which nothing stays; OSError and :class:`SaekitError` where there can be none.
    """
    training = config.training
    logged = min(training.steps // training.log_frequency + 1, _LOGGED)
    numbers = {name: _logged(value) for name, value in metrics.items()}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that cannot be drawn, the run warns
        folder = Path(temporary)
        RunRecord(folder, {"sae": "."}).write({"sae": config}, plugins)
        home = read_run(folder).saes["sae"]
        lines = [
            {**numbers, "step": number + 1, "details/n_training_tokens": training.total_tokens * number // logged}
            for number in range(logged)
        ]
        home.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        clock = Stopwatch()
        with clock():
            pictures_after(folder)
    return clock.seconds
