"""What a configuration chooses beside the SAE itself, built for a run: schedule, optimizer, evals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from saekit.config import TrainConfig
from saekit.distributed.group import Group
from saekit.kinds import LR_SCHEDULES, OPTIMIZERS, SAE_ARCHITECTURES
from saekit.plugins.building import blamed, placed
from saekit.plugins.manager import PluginManager
from saekit.protocols import Eval, ModelBackend
from saekit.runs.checks import chosen_evals
from saekit.runs.opening import seed_for
from saekit.sae.module import SAEModule
from saekit.training.optimizer import ScheduledOptimizer
from saekit.training.schedule import ComposedSchedule, SupervisedSchedule
from saekit.training.shown import Shown
from saekit.values import EvalRun

__all__ = ["make_evals", "make_optimizer", "make_schedule", "moment_bytes", "updates_numbers"]


def make_schedule(config: TrainConfig, plugins: PluginManager) -> ComposedSchedule:
    """The learning rate at every step."""
    lr, item = config.training.lr, plugins.find(LR_SCHEDULES, config.lr_schedule)

    def build(steps: int) -> SupervisedSchedule:
        with placed(item, "lr_schedule"):
            return SupervisedSchedule(plugins.build(LR_SCHEDULES, config.lr_schedule, lr=lr, steps=steps), item, lr)

    return ComposedSchedule(config.training, build)


def make_optimizer(
    config: TrainConfig,
    plugins: PluginManager,
    sae: SAEModule,
    schedule: Callable[[int], float],
    parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    features: Group | None = None,
    rows: Group | None = None,
) -> ScheduledOptimizer:
    """The chosen one, with what is left to the architecture; of ``parameters``, or by default those of ``sae``.

    ``features`` are the processes over which its features are split, and ``rows`` those that have the same.
    """
    chosen = plugins.bound(OPTIMIZERS, config.optimizer)
    with blamed(plugins.find(SAE_ARCHITECTURES, config.sae), f"optimizer_defaults for {chosen.key}"):
        chosen = chosen.with_defaults(sae.config.optimizer_defaults.get(chosen.key, {}))
    clip = chosen.options.clip_grad_norm
    lr = schedule(0)  # what fails in it is not the optimizer's fault
    with blamed(chosen.item, "build"), placed(chosen.item, "optimizer"):
        of = sae.named_parameters() if parameters is None else parameters
        return ScheduledOptimizer(
            of, chosen.build, schedule, lr=lr, clip=clip, table=sae.table, features=features, rows=rows
        )


def moment_bytes(config: TrainConfig, plugins: PluginManager, sae: SAEModule, rows: Group | None = None) -> int | None:
    """What the chosen optimizer keeps of the parameters of ``sae`` beside them, in bytes; None where that is not known.

    Of processes ``rows`` with the same parameters, what this one keeps.  It is asked: it takes a step on parameters of
    the same names that have a few numbers each, and what it has then of their shape it will have of that of the others.
    """
    few = {name: _of_a_few_numbers(parameter) for name, parameter in sae.named_parameters()}
    try:
        optimizer = _of(few, config, plugins, sae)
        optimizer.step(0)
        kept = optimizer.state_dict()
    except Exception:  # with parameters of these sizes a stranger's need not work
        return None
    entries = {entry.name: entry for entry in sae.table}
    rows = rows if rows is not None and optimizer.elementwise else Group()
    return sum(
        value.itemsize * Shown(name, parameter, entries.get(name), rows).own.numel()
        for name, parameter in sae.named_parameters()
        for value in kept.get(name, {}).values()
        if isinstance(value, Tensor) and value.shape == few[name].shape
    )


def updates_numbers(config: TrainConfig, plugins: PluginManager, sae: SAEModule) -> bool:
    """Whether the chosen optimizer says that it updates each number by itself."""
    few = {name: _of_a_few_numbers(parameter) for name, parameter in sae.named_parameters()}
    return _of(few, config, plugins, sae).elementwise


def _of(
    few: Mapping[str, nn.Parameter], config: TrainConfig, plugins: PluginManager, sae: SAEModule
) -> ScheduledOptimizer:
    return make_optimizer(config, plugins, sae, lambda step: config.training.lr, few.items())


def _of_a_few_numbers(parameter: Tensor) -> nn.Parameter:
    """One of the same number of dimensions, laid out alike, in the type that it is trained in, with a gradient."""
    sizes = [min(size, 2 + number) for number, size in enumerate(parameter.shape)]
    turned = parameter.ndim == 2 and parameter.T.is_contiguous() and not parameter.is_contiguous()
    values = torch.ones(sizes[::-1] if turned else sizes, dtype=torch.promote_types(parameter.dtype, torch.float32))
    found = nn.Parameter(values.T if turned else values)
    found.grad = torch.ones_like(found)
    return found


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

    made = {}
    for number, (key, choice) in enumerate(chosen_evals(config, plugins).items()):
        with placed(choice.item, f"evals.run[{number}]"):
            made[key] = choice.build(run=run(key))
    return made
