"""What the processes of a run make of their parts of a step: gradients and numbers of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saekit.distributed.share import Share
from saekit.sae.module import SAEModule
from saekit.values import StepOutput

__all__ = ["of_whole_batch"]


@torch.no_grad()
def of_whole_batch(sae: SAEModule, share: Share, result: StepOutput, rows: int) -> StepOutput:
    """``result`` of a step on this process's ``rows``, with loss, numbers and counts of the whole batch, and gradients
    averaged likewise.

    A loss is a mean over rows, so that of the whole is the mean of those of the parts, each by its rows.
    """
    if share.rows.size == 1:
        return result
    weight = rows / share.n(rows)
    for parameter in sae.parameters():
        if parameter.grad is not None:
            share.rows.sum_(parameter.grad.mul_(weight))
    metrics = {name: value for name, value in result.metrics.items() if isinstance(value, Tensor)}
    numbers = [result.loss, *result.losses.values(), *metrics.values()]
    loss, *others = _averaged(numbers, share, weight)
    losses = dict(zip(result.losses, others, strict=False))
    found: Mapping[str, float | Tensor] = {
        **result.metrics, **dict(zip(metrics, others[len(losses) :], strict=True))
    }  # fmt: skip
    fired = share.total(result.fired)
    return result._replace(loss=loss, losses=losses, metrics=found, fired=fired)


def _averaged(numbers: list[Tensor], share: Share, weight: float) -> list[Tensor]:
    """Scalars, all in one message."""
    wide = torch.promote_types(numbers[0].dtype, torch.float32)
    together = torch.stack([number.detach().to(wide).reshape(()) for number in numbers]) * weight
    return [*share.rows.sum_(together)]
