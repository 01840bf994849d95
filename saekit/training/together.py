"""What the processes of a run make of their parts of a step: gradients and numbers of the whole batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor, nn

from saekit.devices import at_hand
from saekit.distributed.exchange import Exchange
from saekit.distributed.share import Share
from saekit.distributed.sizes import LARGE
from saekit.sae.module import SAEModule
from saekit.training.shown import Shown
from saekit.values import StepOutput

__all__ = ["check_names", "of_whole_batch", "with_exchange"]


def check_names(share: Share, result: StepOutput, sae: nn.Module | None = None) -> None:
    """:class:`ValueError` in every process of a step, where one gives losses or metrics of other names than the first,
    or gradients of other parameters.

    They are added up over processes, which would take them for others.
    """
    if share.rows.size == 1:
        return
    every = share.rows.objects(_names(result, sae))
    for number, (kind, first) in ((number, item) for number in range(len(every)) for item in every[0].items()):
        if odd := sorted({*first} ^ {*every[number][kind]}):
            names = ", ".join(f"{name!r}, which {'only' if name in first else 'not'} the first has" for name in odd[:3])
            if kind == "gradients":
                raise ValueError(
                    f"the processes that share a batch must all give gradients of the same parameters, and process "
                    f"{number} of them gives others than the first: {names}. Give zeros where a parameter takes no part"
                )
            raise ValueError(
                f"the processes that share a batch must all give the same {kind}, and process {number} of them gives "
                f"others than the first: {names}. Give each in every process, 0 where it has nothing to add"
            )


def _names(result: StepOutput, sae: nn.Module | None) -> dict[str, list[str]]:
    given = {"losses": sorted(result.losses), "metrics": sorted(result.metrics)}
    parameters = () if sae is None else sae.named_parameters()
    return {**given, "gradients": sorted(name for name, value in parameters if value.grad is not None)}


def looks_at_parts(sae: SAEModule) -> bool:
    """Whether its ``before_update`` is linear, and looks at each row of a gradient by itself."""
    return type(sae).before_update is SAEModule.before_update


def with_exchange(share: Share, sae: SAEModule, parted: Mapping[nn.Parameter, Shown]) -> Share:
    """``share`` of a step whose processes may give each other their rows in place of gradients, if
    nobody but the optimizer looks at these."""
    kind = type(sae)
    plain = kind.training_step is SAEModule.training_step and kind._step is SAEModule._step
    if not (parted and plain and looks_at_parts(sae) and at_hand(sae.device)):
        return share
    names = [shown.name for shown in parted.values()]
    exchange = Exchange.of(share.rows, share.counts, names, sae.d_sae, sae.d_in + sae.d_out, sae.dtype.itemsize)
    return attrs.evolve(share, exchange=exchange)


@torch.no_grad()
def of_whole_batch(
    sae: SAEModule,
    share: Share,
    result: StepOutput,
    rows: int,
    parted: Mapping[nn.Parameter, Shown],
    *,
    look: bool = True,
) -> tuple[StepOutput, float]:
    """``result`` of a step on this process's ``rows``, with loss, numbers and counts of the whole batch, and gradients
    averaged likewise; and what these are still to be multiplied by.

    A loss is a mean over rows, so that of the whole is the mean of those of the parts, each by its rows.  Where all
    have as many rows, and nobody but the optimizer looks at gradients, it multiplies them as it reads.  Of ``parted``
    parameters other processes update other parts, and unless somebody looks at the whole, own parts of gradients do.

    Before anything else is told, all agree on what will be, by a checksum of names: :func:`check_names` says where
    they do not.  Where to ask would be to wait for the device, it is seen afterwards, in steps that may ``look``.
    """
    if share.rows.size == 1:
        return result, 1.0
    names = zlib.crc32(repr(_names(result, sae)).encode())
    if (agreed := share.rows.same(names)) is False:  # engines take one message for another, or end the process
        check_names(share, result, sae)
    weight, left = rows / share.n(rows), 1.0
    plain = looks_at_parts(sae)
    if len({*share.counts}) == 1 and plain:
        weight, left = 1.0, weight
    small = _summed(sae, share, weight, parted if plain else {})
    wide = torch.promote_types(result.loss.dtype, torch.float32)
    # By their names, since one process may have put them together in another order.
    losses, metrics = ({name: given[name] for name in sorted(given)} for given in (result.losses, result.metrics))
    numbers = [_number(value, result.loss, wide) for value in (result.loss, *losses.values(), *metrics.values())]
    own = [number * (rows / share.n(rows)) for number in numbers]
    asked = [_scalar(names, result.loss)] if agreed is None else []
    sums = share.rows.sums([*asked, result.fired, *small, *own])
    if asked:
        named, *sums = sums
        if look and int(named) != names * share.rows.size:
            check_names(share, result, sae)
    fired, *sums = sums
    for gradient, whole in zip(small, sums, strict=False):
        gradient.copy_(whole)
    loss, *others = sums[len(small) :]
    of_losses = dict(zip(losses, others, strict=False))
    of_metrics = dict(zip(metrics, others[len(losses) :], strict=True))
    return result._replace(
        loss=loss,
        losses={name: of_losses[name] for name in result.losses},
        metrics={name: of_metrics[name] for name in result.metrics},
        fired=fired,
    ), left


def _summed(sae: SAEModule, share: Share, weight: float, parted: Mapping[nn.Parameter, Shown]) -> list[Tensor]:
    """Multiply gradients by ``weight``, and add up the large ones over processes; the small ones are still to be."""
    small = []
    made = frozenset() if share.exchange is None else share.exchange.summed  # of the rows of all
    for name, parameter in sae.named_parameters():
        if (gradient := parameter.grad) is None or name in made:
            continue
        if weight != 1:
            gradient.mul_(weight)
        if parameter in parted:
            parted[parameter].sum_gradient()
        elif gradient.numel() >= LARGE:
            if gradient.stride() != parameter.stride():  # which it may be in this process alone
                parameter.grad = gradient = torch.empty_like(parameter).copy_(gradient)
            share.rows.sum_(gradient)
        else:
            small.append(gradient)
    return small


def _number(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(dtype)
    return _scalar(float(value), like)  # also of a number of NumPy's


def _scalar(value: float, like: Tensor) -> Tensor:
    """Made on the device of ``like``: to copy it there would be to wait."""
    return like.new_full((), value, dtype=torch.float64)
