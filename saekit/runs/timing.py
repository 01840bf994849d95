"""Seconds of a few forwards and steps, and how sizes and times are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saekit.data import ActivationStream, Contexts, StreamContext
from saekit.devices import synchronize
from saekit.errors import DataError
from saekit.site import Site
from saekit.training.trainer import SAETrainer
from saekit.values import Batch

__all__ = [
    "bytes_text", "duration_text", "least_seconds", "silent_at_start", "timed", "timed_forwards", "timed_steps",
]  # fmt: skip

_FORWARDS, _STEPS = 4, 3  # the first of each is not counted
_BARREN = 16  # forwards without a token that counts, after which no more are looked at


def timed_forwards(stream: StreamContext, take: Callable[[int], Contexts]) -> tuple[float, Batch]:
    """Seconds per token, and the activations that came out."""
    activations = ActivationStream(stream, 8)

    def forward() -> Batch | None:
        for _ in range(_BARREN):
            contexts = take(8)
            if not len(contexts):
                return None
            if len(batch := activations.run(contexts)):
                synchronize(batch.activations[stream.sites[0]].device)
                return batch
        raise DataError(
            f"no token of {8 * _BARREN} contexts one after the other counts (tokens.exclude_special_tokens, "
            "tokens.seqpos_slice, tokens.mask_column)"
        )

    return timed(forward, stream.sites)


def timed(make: Callable[[], Batch | None], sites: Sequence[Site]) -> tuple[float, Batch]:
    """The least seconds per token of a few batches, of which the first does not count, and all their rows.

    The least, since whatever else a machine does can only make a batch slower.
    """
    times: list[float] = []
    parts: list[Batch] = []
    for _ in range(_FORWARDS):
        start = time.perf_counter()
        if (batch := make()) is None:
            break
        times.append((time.perf_counter() - start) / len(batch))
        parts.append(batch)
    if not parts:
        raise DataError("there are no activations to time; is there any text?")
    rows = {site: torch.cat([part.activations[site] for part in parts]) for site in sites}
    origins = [_joined([getattr(part, name) for part in parts]) for name in ("tokens", "documents", "positions")]
    return min(times[1:] or times), Batch(rows, *origins)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def timed_steps(trainer: SAETrainer, rows: Batch) -> float:
    """Seconds per step of the real trainer on a full batch."""
    batch = _batch(trainer, rows)
    return least_seconds(
        lambda: trainer.train_on(*trainer.rows_of(batch), batch),
        trainer.device,
        most=min(_STEPS, trainer.training.steps),
    )


def least_seconds(
    work: Callable[[], object], device: torch.device | str, *, most: int, budget: float = math.inf
) -> float:
    """The least seconds of up to ``most`` calls of ``work``, of which the first counts only where it is the only one.

    No call begins that would end after ``budget`` seconds, if it took as long as the quickest so far.
    """
    times: list[float] = []
    for _ in range(most):
        if times and sum(times) + min(times) > budget:
            break
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def silent_at_start(trainer: SAETrainer, rows: Batch) -> tuple[int, float]:
    """Features that fire on none of ``rows`` in the first step, and how often the average feature does.

    Makes that step.
    """
    batch = _batch(trainer, rows)
    result = trainer.train_on(*trainer.rows_of(batch), batch)
    silent = int((trainer.firing.since_fired > 0).sum())
    return silent, float(result["metrics/l0"]) * len(batch) / trainer.sae.d_sae  # type: ignore[arg-type]


def _batch(trainer: SAETrainer, rows: Batch) -> Batch:
    """As many of ``rows`` as a step takes, from the beginning again where there are fewer."""
    training = trainer.training
    size = min(training.train_batch_size_tokens, training.total_tokens)
    taken = torch.arange(size) % len(rows)
    return rows.at(taken)


def bytes_text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
