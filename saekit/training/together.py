"""What the processes of a run make of their parts of a step: gradients and numbers of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saekit.distributed.share import Share
from saekit.distributed.sizes import LARGE
from saekit.sae.module import SAEModule
from saekit.training.shown import Shown
from saekit.values import StepOutput

__all__ = ["of_whole_batch"]


@torch.no_grad()
def of_whole_batch(
    sae: SAEModule, share: Share, result: StepOutput, rows: int, parted: Mapping[nn.Parameter, Shown]
) -> tuple[StepOutput, float]:
    """``result`` of a step on this process's ``rows``, with loss, numbers and counts of the whole batch, and gradients
    averaged likewise; and what these are still to be multiplied by.

    A loss is a mean over rows, so that of the whole is the mean of those of the parts, each by its rows.  Where all
    have as many rows, and nobody but the optimizer looks at gradients, it multiplies them as it reads.  Of ``parted``
    parameters other processes update other parts, and unless somebody looks at the whole, own parts of gradients do.
    """
    if share.rows.size == 1:
        return result, 1.0
    weight, left = rows / share.n(rows), 1.0
    plain = type(sae).before_update is SAEModule.before_update  # which is linear, and looks at each row by itself
    if len({*share.counts}) == 1 and plain:
        weight, left = 1.0, weight
    small = []
    for parameter in sae.parameters():
        if (gradient := parameter.grad) is None:
            continue
        if weight != 1:
            gradient.mul_(weight)
        if plain and parameter in parted:
            parted[parameter].sum_gradient()
        elif gradient.numel() >= LARGE:
            share.rows.sum_(gradient)
        else:
            small.append(gradient)
    metrics = {name: value for name, value in result.metrics.items() if isinstance(value, Tensor)}
    wide = torch.promote_types(result.loss.dtype, torch.float32)
    numbers = [number.detach().to(wide) for number in (result.loss, *result.losses.values(), *metrics.values())]
    fired, *sums = share.rows.sums([result.fired, *small, *(number * (rows / share.n(rows)) for number in numbers)])
    for gradient, whole in zip(small, sums, strict=False):
        gradient.copy_(whole)
    loss, *others = sums[len(small) :]
    losses = dict(zip(result.losses, others, strict=False))
    found: Mapping[str, float | Tensor] = {
        **result.metrics, **dict(zip(metrics, others[len(losses) :], strict=True))
    }  # fmt: skip
    return result._replace(loss=loss, losses=losses, metrics=found, fired=fired), left
