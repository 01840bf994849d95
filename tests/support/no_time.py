"""A clock that only goes where something takes time, and a trainer and forwards that take as much as they are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import saekit
from saekit.distributed.world import ALONE
from saekit.training.firing import FiringStatistics
from saekit.values import Batch

SITE = saekit.Site(hook_name="blocks.0.hook_resid_post")


class Clock:
    """Time that only passes where something takes it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Trainer:
    """Takes so many seconds for a step, which it tells, and three more for the first."""

    device, diverged, world = "cpu", None, ALONE

    def __init__(
        self, clock: Clock, seconds: float = 5.0, *, name: str = "sae", steps: int = 100, batch: int = 8,
        dead_after: int = 1000,
    ) -> None:  # fmt: skip
        self.clock, self.name, self.seconds, self.step, self.tokens = clock, name, seconds, 0, 0
        self.training = SimpleNamespace(
            train_batch_size_tokens=batch, total_tokens=batch * steps, steps=steps, dead_after=dead_after
        )
        self.firing = FiringStatistics(4, dead_after=dead_after, window=1000, device="cpu")
        self.sizes: list[int] = []
        """The rows of each batch."""
        self.seen: list[int] = []
        """The first number of each."""

    @property
    def finished(self) -> bool:
        return self.tokens >= self.training.total_tokens or self.diverged is not None

    def rows_of(self, batch: Batch) -> tuple[torch.Tensor, None]:
        return batch.activations[SITE], None

    def train_on(self, rows: torch.Tensor, target: None, batch: Batch) -> dict[str, Any]:
        self.clock.now += self.seconds + 3 * (self.step == 0)
        self.step, self.tokens = self.step + 1, self.tokens + len(rows)
        self.sizes.append(len(rows))
        self.seen.append(int(rows[0, 0]))
        return {"metrics/l0": float(self.seconds)}


class Forwards:
    """Four rows in two seconds, so many times, each forward with rows of its own number."""

    def __init__(self, clock: Clock, left: int = 1000) -> None:
        self.clock, self.left, self.made = clock, left, 0

    def __next__(self) -> Batch:
        if self.made == self.left:
            raise StopIteration
        self.made, self.clock.now = self.made + 1, self.clock.now + 2
        rows = torch.full((4, 3), float(self.made))
        return Batch({SITE: rows}, *(torch.zeros(4, dtype=torch.long) for _ in range(3)))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...
