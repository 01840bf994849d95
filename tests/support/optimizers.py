"""The kernel's optimizer around one that a plugin builds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from saekit_plugins.optimizers.adam import AdamConfig
from torch import nn

import saekit
from saekit.config import OptimizerConfig
from saekit.kinds import OPTIMIZERS
from saekit.training.optimizer import ScheduledOptimizer


def optimizer_for(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    schedule: Callable[[int], float],
    **more: Any,
) -> ScheduledOptimizer:
    """The one that ``config`` chooses."""
    build = functools.partial(saekit.default_manager().build, OPTIMIZERS, config)
    return ScheduledOptimizer(parameters, build, schedule, clip=config.clip_grad_norm, **more)


def adam_for(
    parameters: Iterable[tuple[str, nn.Parameter]], schedule: Callable[[int], float], **options: Any
) -> ScheduledOptimizer:
    """Adam with ``options``."""
    return optimizer_for(parameters, AdamConfig(**options), schedule)
