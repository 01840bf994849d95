"""What an SAE architecture that says ``spreads_over`` promises of two processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from saekit.testing.checks.check import Checks, NotTried, Subject
from saekit.testing.checks.dictionaries import copied, made, must_be_one_step, rows, step_input, takes, uninitialized
from saekit.testing.checks.numbers import must_agree
from saekit.testing.checks.two_processes import DATA, FEATURES, Mesh, on_two

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.distributed import World
    from saekit.pretrained.sae import SAE
    from saekit.values import StepInput, StepOutput

__all__ = ["SPREAD"]

SPREAD = Checks()
_EXACT = 1e-9
_COUNTS, _EVEN = (14, 10), (12, 12)
"""Rows of each of two processes; where they are as many, processes may give each other their rows."""
_STEPS = ((0, 0.0), (3, 0.4))
"""Number and part of the features that is dead."""
_UPDATES, _LR = 2, 0.05
_PLAIN = "autograd"
_NAMES: dict[str, Mesh] = {"data": DATA, "features": FEATURES}


@SPREAD.add
def two_processes(subject: Subject) -> None:
    """What it says that may be split (``spreads_over``, its kernels too): steps of two processes are those of one, in
    reports, gradients and state, and in weights where each process updates its part of them, to 1e-9 in float64."""
    step_input(uninitialized(subject))  # what is for inference alone says so
    works, saes, refused = {}, {}, []
    for name, mesh in _NAMES.items():
        cases, reasons = [], []
        for where, ports in (*takes(subject),)[:: len((*takes(subject),)) - 1 or 1]:
            sae = made(subject, ports)
            if reason := _refused(sae, *mesh):
                reasons.append(reason)
            else:
                cases += [(where, way, one) for way, one in _ways(sae, name)]
        refused += reasons[:1]
        if cases:
            saes[mesh] = cases
            works[mesh] = partial(_stepped_by_two, [one for *_, one in cases])
    if not works:
        says = ", ".join(sorted(sae.spreads_over & _NAMES.keys()))
        what = f"it says spreads_over = {{{says}}}" if says else "it does not say spreads_over"
        raise NotTried(f"{what}, and runs on several processes refuse it: {'; '.join(dict.fromkeys(refused))}")
    # Before the forks, which then have what torch imports, for seconds, when the first optimizer is made.
    alone = {where: _stepped_by_one(sae) for cases in saes.values() for where, way, sae in cases if way == _PLAIN}
    for mesh, (found, other) in on_two(works, subject.place).items():
        split = "batches" if mesh == DATA else "features"
        for (where, way, sae), own, theirs in zip(saes[mesh], found, other, strict=True):
            steps, updated = alone[where]
            about = f" ({split} split over 2 processes, {where}, {way})"
            for told, weights in (own, theirs):
                for (one, right), (step, state) in zip(steps, told, strict=True):
                    _must_be_that_of_one(sae, one, right, step, state, about)
                for name, value in updated.items():
                    must_agree(f"{name} after updates{about}", weights[name], value, _EXACT)


def _refused(sae: SAE, data: int, features: int) -> str | None:
    """Why a run would refuse it there."""
    from saekit.errors import ConfigError
    from saekit.sae.splitting import check_spread

    try:
        check_spread(sae, data, features)
    except ConfigError as error:
        return str(error)
    return None


def _ways(sae: SAE, name: str) -> Iterator[tuple[str, SAE]]:
    """By autograd, and by each kernel that would take a step of it there."""
    spread = frozenset({name})
    plain: Any = copied(sae, "reference")
    plain.spread = spread
    yield _PLAIN, plain
    for kernel in sae.step_kernels:
        fast: Any = copied(sae, "fast")
        fast.step_kernels, fast.spread = (kernel,), spread
        if fast.why_reference() is None:
            yield kernel.name, fast


_Told: TypeAlias = "tuple[list[tuple[StepOutput, dict[str, dict[str, Tensor]]]], dict[str, Tensor]]"


def _stepped_by_two(saes: list[SAE], world: World) -> list[_Told]:
    """Of each, what this process knows of the whole after each step, and the weights after updates."""
    return [
        ([_step_of_two(sae, number, dead, world) for number, dead in _STEPS], _updated(_copied(sae), world))
        for sae in saes
    ]


def _own_part(
    whole: SAE, sae: SAE, number: int, dead: float, world: World, counts: tuple[int, ...] = _COUNTS
) -> tuple[Tensor, StepInput]:
    """Rows of this process for a step of ``sae``, its part of ``whole``, which is told its share of it."""
    x, target = rows(whole.ports)
    step = step_input(whole, step=number, dead=dead, target=target)
    counts = counts if world.data.size > 1 else ()
    first = sum(counts[: world.data.rank])
    own = slice(first, first + counts[world.data.rank]) if counts else slice(None)
    sae.share = share = world.share(counts)
    part = slice(share.first_feature(sae.d_sae), share.first_feature(sae.d_sae) + sae.d_sae)
    step = attrs.evolve(
        step,
        dead=None if step.dead is None else step.dead[part],
        target=None if target is None else target[own],
    )
    return x[own], step


def _step_of_two(whole: SAE, number: int, dead: float, world: World) -> tuple[StepOutput, dict[str, dict[str, Tensor]]]:
    from saekit.sae.splitting import keep_part
    from saekit.training.together import of_whole_batch

    sae: Any = _copied(whole)
    if world.features.size > 1:
        keep_part(sae, world.features)
    x, step = _own_part(whole, sae, number, dead, world)
    share = sae.share
    found, left = of_whole_batch(sae, share, sae.training_step(x, step), len(x), {})
    found = found._replace(
        loss=found.loss.detach(), output=share.all_rows(found.output), fired=share.all_features(found.fired)
    )
    gradients = {}
    for entry in sae.table:
        value = getattr(sae, entry.name)
        if value is not None and value.grad is not None:
            dim = None if entry.split is None else entry.dims.index(entry.split)
            gradients[entry.name] = _gathered(value.grad * left, dim, world)
    buffers = {name: buffer.detach().clone() for name, buffer in sae.named_buffers()}
    return found, {"gradients": gradients, "buffers": buffers}


def _updated(whole: SAE, world: World | None = None) -> dict[str, Tensor]:
    """The weights of all features after updates as of training, in which each process of ``world`` updates its part of
    all that can be divided; None: one process."""
    import torch

    from saekit.distributed import ALONE
    from saekit.sae.splitting import keep_part
    from saekit.training.optimizer import ScheduledOptimizer
    from saekit.training.together import of_whole_batch, with_exchange

    class Descent(torch.optim.SGD):
        elementwise = True

    world, sae = world or ALONE, _copied(whole)
    if world.features.size > 1:
        keep_part(sae, world.features)
    for entry in sae.table:  # the numbers of a feature together, as training has them
        value = getattr(sae, entry.name)
        if value is not None and entry.dims[1:] == ("d_sae",):
            value.data = value.data.T.contiguous().T
    optimizer = ScheduledOptimizer(
        sae.named_parameters(),
        lambda groups, lr: Descent(groups, lr=lr, momentum=0.5),
        lambda step: _LR,
        table=sae.table,
        features=world.features,
        rows=world.data,
        large=1,
    )
    for number in range(_UPDATES):
        x, step = _own_part(whole, sae, number, 0.0, world, (_COUNTS, _EVEN)[number % 2])
        sae.share = with_exchange(sae.share, sae, optimizer.parted)
        if sae.share.exchange is not None:
            sae.share.exchange.most = 1 << 30  # however many are active
        result = sae.training_step(x, step)
        result, factor = of_whole_batch(sae, sae.share, result, len(x), optimizer.parted)
        sae.before_update()
        optimizer.step(number, result.loss, factor)
        sae.after_update()
    splits = {entry.name: None if entry.split is None else entry.dims.index(entry.split) for entry in sae.table}
    return {name: _gathered(value.detach(), splits.get(name), world) for name, value in sae.named_parameters()}


def _copied(whole: SAE) -> SAE:
    """With the kernels and the split of ``whole``, which are not of its state."""
    sae: Any = copied(whole)
    sae.spread = whole.spread
    return sae  # type: ignore[no-any-return]


def _gathered(value: Tensor, dim: int | None, world: World) -> Tensor:
    import torch

    return value.clone() if dim is None else torch.cat(world.features.gather(value), dim=dim)


def _stepped_by_one(sae: SAE) -> tuple[list[tuple[SAE, StepOutput]], dict[str, Tensor]]:
    """By one process: each step, with the dictionary that has its gradients, and the weights after updates."""
    steps = []
    x, target = rows(sae.ports)
    for number, dead in _STEPS:
        one = copied(sae, "reference")
        steps.append((one, one.training_step(x, step_input(one, step=number, dead=dead, target=target))))
    return steps, _updated(copied(sae, "reference"))


def _must_be_that_of_one(
    sae: SAE, one: SAE, expected: StepOutput, found: StepOutput, state: dict[str, dict[str, Tensor]], where: str
) -> None:
    import torch

    several = copied(sae)
    for name, value in several.named_parameters():
        value.grad = state["gradients"].get(name)
    with torch.no_grad():
        for name, buffer in several.named_buffers():
            buffer.copy_(state["buffers"][name])
    must_be_one_step(several, found, one, expected, tolerance=_EXACT, where=where)
