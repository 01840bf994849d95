"""What the processes of a run make of their parts of a step: gradients and numbers of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saekit.distributed.share import Share
from saekit.distributed.sizes import LARGE
from saekit.sae.module import SAEModule
from saekit.values import StepOutput

__all__ = ["of_whole_batch"]


@torch.no_grad()
def of_whole_batch(sae: SAEModule, share: Share, result: StepOutput, rows: int) -> tuple[StepOutput, float]:
    """``result`` of a step on this process's ``rows``, with loss, numbers and counts of the whole batch, and gradients
    averaged likewise; and what these are still to be multiplied by.

    A loss is a mean over rows, so that of the whole is the mean of those of the parts, each by its rows.  Where all
    have as many rows, and nobody but the optimizer looks at gradients, it multiplies them as it reads.
    """
    if share.rows.size == 1:
        return result, 1.0
    weight, left = rows / share.n(rows), 1.0
    if len({*share.counts}) == 1 and type(sae).before_update is SAEModule.before_update:  # which is linear
        weight, left = 1.0, weight
    gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    small = [gradient for gradient in gradients if gradient.numel() < LARGE]
    for gradient in gradients:
        if weight != 1:
            gradient.mul_(weight)
        if gradient.numel() >= LARGE:
            share.rows.sum_(gradient)
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
