"""The least seconds of work, and how sizes and times are told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from saekit.devices import synchronize

__all__ = ["bytes_text", "duration_text", "least_seconds"]


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


def bytes_text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:  # as what is rounded to 1,000 is not
            return f"{size:,.3g} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
