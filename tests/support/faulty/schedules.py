"""Schedules that break a promise each."""

from __future__ import annotations

import math
from typing import Any

from support.faulty.case import cases


class Falling:
    """Nothing is wrong with it."""

    def __init__(self, config: Any, *, lr: float, steps: int) -> None:
        self.lr, self.steps, self.end = lr, steps, lr / 2

    def __call__(self, step: int) -> float:
        return self.lr * (1 - step / self.steps / 2)


class Lost(Falling):
    def __call__(self, step: int) -> float:
        return math.nan if step == 50 else super().__call__(step)


class BelowZero(Falling):
    def __init__(self, config: Any, **services: Any) -> None:
        super().__init__(config, **services)
        self.end = -1.0


class Counting(Falling):
    asked = 0

    def __call__(self, step: int) -> float:
        self.asked += 1
        return super().__call__(self.asked - 1)


class Dividing(Falling):
    def __call__(self, step: int) -> float:
        return self.lr * step / (self.steps - 1)


class Odd(Falling):
    def remark(self) -> Any:
        return 3


CASES = cases(
    "lr_schedules",
    {
        "build": ("a class, expected an LR schedule: an instance of it", lambda config, **services: Falling),
        "finite": ("at step 50 of 103 is nan, expected a finite number, 0 or more", Lost),
        "end": ("end is -1.0, expected a finite number, 0 or more", BelowZero),
        "any_order": (r"at step 102 it is .* after those before, and .* asked at once", Counting),
        "short_runs": ("ZeroDivisionError", Dividing),
        "remark": (r"remark\(\) is 3, expected a text or None", Odd),
    },
)
