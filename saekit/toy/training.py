"""How a toy model comes to be."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.errors import DivergedError
from saekit.kinds import LR_SCHEDULES
from saekit.plugins.manager import PluginManager, default_manager
from saekit.toy.config import ToyConfig
from saekit.toy.model import ToyModel
from saekit.training.schedule import ComposedSchedule, SupervisedSchedule

__all__ = ["ToyTraining", "train_toy_model"]


@attrs.frozen(eq=False, repr=False)
class ToyTraining:
    """What training a toy model leaves behind."""

    model: ToyModel
    losses: Tensor
    """``[steps]``, that of each step's batch before the step."""
    rates: Tensor
    """``[steps]``, the learning rates."""
    frames: Tensor
    """``[k, n_features, n_hidden]``, the directions at ``frame_steps``."""
    frame_steps: tuple[int, ...]
    """After how many steps: the first is 0, the last the end."""

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"ToyTraining({config.n_features} features in {config.n_hidden} dimensions: loss {self.losses[0]:.4g} to "
            f"{self.losses[-1]:.4g} in {len(self.losses):,} steps)"
        )


@ambient()
def train_toy_model(
    config: ToyConfig | None = None, *, frames: int = 2, plugins: PluginManager | None = None
) -> ToyTraining:
    """Train the toy model of ``config`` on the CPU; the same options give the same weights on one machine.

    ``frames`` is how often its directions are kept, from the start to the end, for :func:`animate_directions`: 2 or
    more.  Raises :class:`saekit.errors.DivergedError` when the loss is no finite number any more.
    """
    if frames < 2:
        raise ValueError(f"frames must be 2 or more, the start and the end, found {frames}")
    config = config or ToyConfig()
    rate = _schedule(config, plugins or default_manager())
    generator = torch.Generator().manual_seed(config.seed)
    model = ToyModel(config, generator)
    # Whole numbers are fine as betas: torch itself takes floats or tensors only.
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(float(config.beta1), float(config.beta2)))
    wanted = set(_frame_steps(config.steps, frames))
    kept, losses, rates = {0: model.directions}, [], []
    for step in range(config.steps):
        lr = rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model.loss(model.draw(config.batch_size, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        rates.append(lr)
        if step + 1 in wanted:
            _check(loss, step)
            kept[step + 1] = model.directions
    return ToyTraining(
        model, torch.stack(losses), torch.tensor(rates, dtype=torch.float64), torch.stack([*kept.values()]), tuple(kept)
    )


def _schedule(config: ToyConfig, plugins: PluginManager) -> ComposedSchedule:
    """Warm-up, the chosen schedule and decay, as those of SAEs."""
    choice = plugins.bound(LR_SCHEDULES, config.lr_schedule)
    return ComposedSchedule(
        config.training(), lambda steps: SupervisedSchedule(choice.build(lr=config.lr, steps=steps), choice.item)
    )


def _frame_steps(steps: int, frames: int) -> Iterator[int]:
    """Evenly spread, but closer at the beginning, when most happens: the square of an even spread."""
    for frame in range(frames):
        yield round(steps * (frame / (frames - 1)) ** 2)


def _check(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise DivergedError(f"the toy model's loss is {loss.item()} after {step + 1} steps; lower lr")
