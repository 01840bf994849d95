"""Evals that break a promise each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from support.faulty.case import cases

Measure = Callable[..., Any]


def tensor(sae: Any, **given: Any) -> Any:
    return {"norm": sae.decoder_norms().sum()}


def counting() -> Measure:
    count = itertools.count()
    return lambda sae, **given: {"number": float(next(count))}


def hooking(sae: Any, **given: Any) -> Any:
    sae.hook_sae_output.add_hook(lambda x, hook: None)
    return {}


def clearing(sae: Any, *, contexts: Any, **given: Any) -> Any:
    contexts.zero_()
    return {}


def keeping() -> Measure:
    """What it measured first counts for all."""
    kept: list[float] = []

    def measure(sae: Any, **given: Any) -> Any:
        kept.append(float(sae.d_sae))
        return {"features": kept[0]}

    return measure


CASES = cases(
    "evals",
    {
        "build": ("expected an eval", lambda config: None),
        "numbers": (r"norm is tensor\(.*\), expected a plain number", lambda config: tensor),
        "repeatable": ("the numbers of a second time, number: found 1.0, expected 0.0", lambda config: counting()),
        "leaves_the_sae": ("of the SAE, afterwards, hooks: found 1, expected 0", lambda config: hooking),
        "leaves_the_model": ("the contexts, afterwards,: other numbers", lambda config: clearing),
        "several": ("the numbers of an SAE after another's, features: found 40.0", lambda config: keeping()),
    },
)
