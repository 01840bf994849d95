"""What a learning-rate schedule promises."""

from __future__ import annotations

import math
from typing import Any

from saekit.abilities import Remarks
from saekit.errors import SaekitError
from saekit.testing.checks.check import Checks, NotTried, Subject, must
from saekit.testing.checks.numbers import is_number

CHECKS = Checks()
_LR, _STEPS = 0.4, 103


def _scheduled(subject: Subject, steps: int = _STEPS) -> Any:
    return subject.build(lr=_LR, steps=steps)


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built for a peak rate and a number of steps, and keeps to its protocol."""
    _scheduled(subject)


@CHECKS.add
def finite(subject: Subject) -> None:
    """At each of its steps, from 0, the rate is a finite number, 0 or more."""
    schedule = _scheduled(subject)
    for step in range(_STEPS):
        _must_be_rate(schedule(step), f"at step {step} of {_STEPS}")


@CHECKS.add
def end(subject: Subject) -> None:
    """``end``, from where the decay starts, is a finite number, 0 or more."""
    _must_be_rate(_scheduled(subject).end, "end")


def _must_be_rate(rate: object, where: str) -> None:
    fine = is_number(rate) and math.isfinite(rate) and rate >= 0  # type: ignore[operator,arg-type]
    must(fine, f"{where} is {rate!r}, expected a finite number, 0 or more")


@CHECKS.add
def any_order(subject: Subject) -> None:
    """The rate at a step is the same whatever was asked before, so that a run can go on at any step."""
    once = _scheduled(subject)
    rates = [once(step) for step in range(_STEPS)]
    for step in (_STEPS - 1, 0, _STEPS // 2):
        fresh, again = _scheduled(subject)(step), once(step)
        must(fresh == rates[step], f"at step {step} it is {rates[step]} after those before, and {fresh} asked at once")
        must(again == rates[step], f"at step {step} it is {rates[step]}, and {again} when asked again")


@CHECKS.add
def short_runs(subject: Subject) -> None:
    """Runs of few steps have finite rates, too, or are refused with a :class:`saekit.errors.SaekitError`."""
    for steps in (1, 2, 3):
        try:
            schedule = _scheduled(subject, steps)
        except SaekitError as error:
            must(error.exit_code == 2, f"of {steps} steps in all: {error}")
            continue
        for step in range(steps):
            _must_be_rate(schedule(step), f"at step {step} of {steps}")
        _must_be_rate(schedule.end, f"end, of {steps} steps in all,")


@CHECKS.add
def remark(subject: Subject) -> None:
    """Where it has a ``remark()``, that is a text or None."""
    schedule = _scheduled(subject)
    if not isinstance(schedule, Remarks):
        raise NotTried("it has none")
    said = schedule.remark()
    must(said is None or isinstance(said, str), f"remark() is {said!r}, expected a text or None")
