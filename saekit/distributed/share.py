"""What one process has of a training step: some rows of the batch, some features of the SAE.

What an architecture asks of a whole batch, or of all features, it asks here.  With one process every answer is the
plain one, by the very operations that would stand in its place.

A loss is the same number on every process of a feature group, so the gradient of a sum over features passes to each
part as it is; and what all have alike, such as ``b_dec``, gets from each process the part of its own features, which
:meth:`Share.alike` adds up (Shoeybi et al. 2019, "Megatron-LM", section 3).  Gradients of the rows of several processes
are averaged by the trainer.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.distributed.group import Group

__all__ = ["WHOLE", "Share"]


class _Summed(torch.autograd.Function):
    """The sum over a group, whose gradient passes to each part as it is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        return group.sum(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Alike(torch.autograd.Function):
    """The value itself, whose gradient is the sum of those of a group."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient), None


@attrs.frozen(eq=False)
class Share:
    """Of a step: ``rows`` are the processes among which the batch is split, ``features`` those that split the SAE."""

    rows: Group = attrs.field(factory=Group)
    features: Group = attrs.field(factory=Group)
    first_row: int = 0
    """The number of this process's first row in the batch."""
    of_rows: int | None = None
    """Rows of the whole batch; None: this process has all of them."""
    first_feature: int = 0
    """The number of this process's first feature."""
    of_features: int | None = None
    """Features of the whole SAE; None: this process has all of them."""

    # ---- of all rows

    def row_sum(self, values: Tensor) -> Tensor:
        """``Σ`` over the rows of the whole batch of ``values [n, ...]``.  No gradient flows where there are several."""
        return values.sum(0) if self.rows.size == 1 else self.rows.sum(values.sum(0))

    def row_mean(self, values: Tensor) -> Tensor:
        """The mean over the rows of the whole batch, likewise."""
        if self.rows.size == 1:
            return values.mean(0)
        assert self.of_rows is not None
        return self.rows.sum(values.sum(0)) / self.of_rows

    def total(self, value: Tensor) -> Tensor:
        """The sum over the row groups of a ``value`` that is a sum over own rows; no gradient."""
        return self.rows.sum(value)

    def n(self, rows: int) -> int:
        """Rows of the whole batch, of which this process has ``rows``."""
        return rows if self.of_rows is None else self.of_rows

    # ---- of all features

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all features, of which ``part`` is that over own ones, with its gradient."""
        return part if self.features.size == 1 else _Summed.apply(part, self.features)  # type: ignore[no-untyped-call]

    def alike(self, value: Tensor) -> Tensor:
        """``value``, which all processes have alike, where it meets own features alone: its gradient is that of all."""
        return value if self.features.size == 1 else _Alike.apply(value, self.features)  # type: ignore[no-untyped-call]

    def count(self, own: Tensor) -> Tensor:
        """How many of all features are, of which ``own [d_sae]`` says so of own ones: a scalar."""
        return self.features.sum(own.sum())

    def any(self, own: Tensor) -> bool:
        """Whether any feature is; the device is waited for."""
        return bool(self.count(own) > 0)

    def largest(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of each row of ``values [..., d_sae]``, those of own features that are among the ``k`` largest of all.

        Their places, ``[..., m]``, and whether each of these is one, ``[..., m]`` bool; of one process all are.
        """
        found = values.topk(min(k, values.shape[-1]), dim=-1, sorted=False)
        if self.features.size == 1:
            return found.indices, torch.ones_like(found.indices, dtype=torch.bool)
        return found.indices, self.among_largest(found.values, k)

    def among_largest(self, values: Tensor, k: int) -> Tensor:
        """Which of ``values [..., m]``, candidates of own features, are among the ``k`` largest of all candidates."""
        everywhere = torch.cat(self.features.gather(values), dim=-1)
        best = everywhere.topk(min(k, everywhere.shape[-1]), dim=-1, sorted=False).indices
        chosen = torch.zeros_like(everywhere, dtype=torch.bool).scatter_(-1, best, True)
        first = self.features.rank * values.shape[-1]
        return chosen[..., first : first + values.shape[-1]]

    # ---- of both

    @property
    def split(self) -> bool:
        """Whether other processes have other rows or features."""
        return self.rows.size > 1 or self.features.size > 1

    def everybody(self, own: Tensor) -> list[Tensor]:
        """``own`` of every process of the step, in the order of features within that of rows; one shape for all."""
        return [one for part in self.features.gather(own) for one in self.rows.gather(part)] if self.split else [own]

    def noise(self, rows: int, features: int, generator: torch.Generator) -> Tensor:
        """``[rows, features]``: this process's part of normal numbers that are drawn for all rows and all features."""
        whole = (self.n(rows), features if self.of_features is None else self.of_features)
        drawn = torch.randn(*whole, generator=generator, device=generator.device)
        return drawn[self.first_row : self.first_row + rows, self.first_feature : self.first_feature + features]


WHOLE = Share()
"""Of one process: all rows and all features."""
