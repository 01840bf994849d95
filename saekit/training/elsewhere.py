"""SAEs of a sweep that other processes train: what all must know of them, and how they hear of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Self, TypeAlias

import attrs
import torch
from torch import Tensor

from saekit.distributed.group import Group
from saekit.errors import DivergedError
from saekit.training.trainer import SAETrainer
from saekit.values import Histogram

__all__ = ["Elsewhere", "Told", "check_all", "dealt_out", "told_by_all"]

Told: TypeAlias = list[tuple[SAETrainer, dict[str, float | Histogram]]]
"""What a step gave, of each SAE."""


@attrs.define
class Elsewhere(SAETrainer):
    """An SAE that another process trains, here without its numbers: it counts the steps that are made there."""

    optimizer: Any = None
    path: str = ""
    """How its steps are made, in words."""

    @classmethod
    def of(cls, trainer: SAETrainer) -> Self:
        """In the place of ``trainer``, whose memory may go."""
        left = ("optimizer", "sae")
        given = {
            str(field.alias): getattr(trainer, field.name)
            for field in attrs.fields(SAETrainer)
            if field.init and field.name not in left
        }
        path = trainer.step_path()
        return cls(sae=trainer.sae.to("meta"), path=path, **given)

    def pass_by(self, rows: int) -> None:
        """Another process has made its step on so many rows."""
        self.step += 1
        self.tokens += rows

    def step_path(self) -> str:
        return self.path

    def train_on(self, rows: Tensor, target: Tensor | None = None, batch: Any = None) -> NoReturn:
        raise AssertionError(f"{self.name} trains in another process")

    def raw_sae(self) -> NoReturn:
        raise AssertionError(f"{self.name} is in another process")

    def check_weights(self) -> None:
        """The process that has them does."""

    def state_dict(self) -> NoReturn:
        raise AssertionError(f"the state of {self.name} is in another process")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a whole state, the few facts that all must know."""
        self.step, self.tokens, self.diverged = state["step"], state["tokens"], state["diverged"]


def dealt_out(weights: Sequence[int], groups: int) -> list[int]:
    """In which of so many groups each SAE trains, the largest first, each where there are the fewest ``weights`` yet.

    Graham 1969, "Bounds on multiprocessing timing anomalies": no group has more than 4/3 of the least that is possible.
    """
    loads, found = [0] * groups, [0] * len(weights)
    for number in sorted(range(len(weights)), key=lambda number: (-weights[number], number)):
        found[number] = loads.index(min(loads))
        loads[found[number]] += weights[number]
    return found


def told_by_all(group: Group, found: Told) -> Told:
    """``found`` with what other processes of ``group`` say of the SAEs that they train: metrics, and that one diverged.

    Every process must ask after each step.
    """
    if group.size == 1:
        return found
    own = {
        trainer.name: (metrics, trainer.diverged)
        for trainer, metrics in found
        if not isinstance(trainer, Elsewhere) and (metrics or trainer.diverged is not None)
    }
    if not any(int(number) for number in group.gather(torch.tensor(len(own)))):  # which is a short message
        return found
    every = {name: told for part in group.objects(own) for name, told in part.items()}
    for trainer, metrics in found:
        if isinstance(trainer, Elsewhere) and trainer.name in every:
            theirs, trainer.diverged = every[trainer.name]
            metrics |= theirs
    return found


def check_all(group: Group, trainers: Collection[SAETrainer]) -> None:
    """An SAE whose weights are not finite has diverged, whichever process of ``group`` finds it."""
    well = [trainer for trainer in trainers if trainer.diverged is None]
    for trainer in well:
        try:
            trainer.check_weights()
        except DivergedError as error:
            trainer.diverged = str(error)
    told_by_all(group, [(trainer, {}) for trainer in well])
