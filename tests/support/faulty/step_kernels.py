"""Step kernels that break a promise each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from saekit_plugins.architectures.topk.module import TopKKernel
from support.faulty.case import Case, cases
from torch import Tensor

from saekit.testing import fake_plugin
from saekit.values import StepInput, StepOutput


class Right(TopKKernel):
    """Nothing is wrong with it."""

    name = "a stranger's kernel"

    def __init__(self, config: Any = None) -> None:
        """There are no options."""


class Nowhere(Right):
    devices = frozenset()


class Unkept(Right):
    def __init__(self, config: Any = None) -> None:
        self.made_here = lambda: None


class Eager(Right):
    def refuses(self, sae: Any, use: Any) -> str | None:
        return None


class Doubled(Right):
    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Any) -> StepOutput:
        found = super().step(sae, x, step, workspace)
        sae.W_dec.grad *= 2
        return found


class Shifted(Right):
    def groups(self, sae: Any, rows: Tensor, workspace: Any) -> Iterator[tuple[int, Any]]:
        return super().groups(sae, rows + 1e-6, workspace)


CASES = [
    *cases(
        "step_kernels",
        {
            "build": ("its devices are frozenset\\(\\), expected", Nowhere),
            "copies": ("made_here|lambda", Unkept),
            "refusals": ("with kernels=.reference. it says None, expected why not \\(saekit:topk\\)", Eager),
            "steps": ("the gradient of W_dec \\(saekit:topk\\)", Doubled),
            "inference": ("(features|outputs) \\(saekit:topk\\)", Shifted),
        },
        serves=("saekit:topk",),
    ),
    Case(
        "serves",
        "it serves .topk., which must be .saekit:topk.",
        fake_plugin("step_kernels", build=Right, serves=("topk",)),
    ),
]
