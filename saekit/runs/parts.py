"""What a configuration chooses beside the SAE itself, built for a run: schedule, optimizer, evals."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from saekit.config import OptimizerConfig, TrainConfig
from saekit.errors import PluginFailedError
from saekit.kinds import LR_SCHEDULES, OPTIMIZERS, SAE_ARCHITECTURES
from saekit.plugins.building import blamed
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.runs.checks import chosen_evals
from saekit.runs.opening import seed_for
from saekit.sae.module import SAEModule
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.schedule import ComposedSchedule, SupervisedSchedule
from saekit.values import EvalRun

__all__ = ["make_evals", "make_optimizer", "make_schedule"]


def make_schedule(config: TrainConfig, plugins: PluginManager) -> ComposedSchedule:
    """The learning rate at every step."""
    lr, item = config.training.lr, plugins.find(LR_SCHEDULES, config.lr_schedule)

    def build(steps: int) -> SupervisedSchedule:
        return SupervisedSchedule(plugins.build(LR_SCHEDULES, config.lr_schedule, lr=lr, steps=steps), item)

    return ComposedSchedule(config.training, build)


def make_optimizer(
    config: TrainConfig, plugins: PluginManager, sae: SAEModule, schedule: ComposedSchedule
) -> ScheduledOptimizer:
    """The chosen one, with what is left to the architecture."""
    chosen = plugins.bound(OPTIMIZERS, config.optimizer)
    if not isinstance(chosen.options, OptimizerConfig):
        raise PluginFailedError(
            f"optimizer {chosen.key!r}: its options class, {type(chosen.options).__name__}, must derive from "
            "saekit.config.OptimizerConfig, which has clip_grad_norm"
        )
    with blamed(plugins.find(SAE_ARCHITECTURES, config.sae), f"optimizer_defaults for {chosen.key}"):
        chosen = chosen.with_defaults(sae.config.optimizer_defaults.get(chosen.key, {}))
    clip = chosen.options.clip_grad_norm
    with blamed(chosen.item, "build"):
        return ScheduledOptimizer(sae.named_parameters(), chosen.build, schedule, clip=clip, table=sae.table)


def make_evals(
    config: TrainConfig,
    plugins: PluginManager,
    backend: ModelBackend,
    open_contexts: Callable[[], Tensor | None],
    device: str,
    name: str = "sae",
) -> dict[str, Eval]:
    """What is measured, by qualified key."""

    def run(key: str) -> EvalRun:
        return EvalRun(
            name=name,
            backend=backend,
            sites=config.sites,
            device=device,
            steps=config.training.steps,
            seed=seed_for(config.training.seed, f"eval {key}"),
            open_contexts=open_contexts,
        )

    return {key: choice.build(run=run(key)) for key, choice in chosen_evals(config, plugins).items()}
