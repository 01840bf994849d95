"""What one process has of a training step: some rows of the batch, some features of the SAE.

What an architecture asks of a whole batch, or of all features, it asks here.  With one process every answer is the
plain one, by the very operations that would stand in its place.

A loss is the same number on every process of a feature group, so the gradient of a sum over features passes to each
part as it is; and what all have alike, such as ``b_dec``, gets from each process the part of its own features, which
:meth:`Share.alike` adds up (Shoeybi et al. 2019, "Megatron-LM", section 3).  Gradients of the rows of several processes
are averaged by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit.distributed.drawing import drawn_part
from saekit.distributed.exchange import Exchange
from saekit.distributed.group import Group
from saekit.distributed.largest import keys_bits, sorted_keys, threshold
from saekit.distributed.sizes import FEW, OF_ALL, OF_ROWS

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
    counts: tuple[int, ...] = ()
    """Rows of each process of ``rows``; empty: this process has all of them."""
    exchange: Exchange | None = None
    """Where processes may give each other their rows in place of gradients."""

    @property
    def split(self) -> bool:
        """Whether other processes have other rows or features."""
        return self.rows.size > 1 or self.features.size > 1

    @contextmanager
    def agreed(self, kernel: object = None) -> Iterator[None]:
        """Around a step by ``kernel``, or by autograd: at its end all agree how its weights' gradients are made."""
        if self.exchange is not None:
            self.exchange.serves = bool(vars(type(kernel)).get("leaves_weights", False))
        yield
        if self.exchange is not None:
            self.exchange.agree()

    # ---- of all rows

    def n(self, rows: int) -> int:
        """Rows of the whole batch, of which this process has ``rows``."""
        return rows if self.rows.size == 1 else sum(self.counts)

    def row_mean(self, values: Tensor) -> Tensor:
        """The mean ``[...]`` of ``values [n, ...]`` over the rows of the whole batch; without a gradient if that is
        split."""
        if self.rows.size == 1:
            return values.mean(0)
        return self.rows.sum(values.sum(0)) / self.n(len(values))

    def mean(self, values: Tensor) -> Tensor:
        """The same of ``values [n]``: a scalar."""
        return values.mean() if self.rows.size == 1 else self.row_mean(values)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the whole batch, of which ``value`` is that over own rows; without a gradient if it is split."""
        return self.rows.sum(value)

    def all_rows(self, values: Tensor) -> Tensor:
        """``values [n, ...]`` of all rows of the whole batch, in their order."""
        return values if self.rows.size == 1 else torch.cat(self.rows.gather_rows(values, self.counts))

    # ---- of all features

    @property
    def parts(self) -> int:
        """In how many parts features are split."""
        return self.features.size

    def first_feature(self, own: int) -> int:
        """The number of this process's first feature, of which it has ``own``."""
        return self.features.rank * own

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all features, of which ``part`` is that over own ones, with its gradient."""
        return part if self.parts == 1 else _Summed.apply(part, self.features)  # type: ignore[no-untyped-call]

    def alike(self, value: Tensor) -> Tensor:
        """``value``, which all processes have alike, where it meets own features alone: its gradient is that of all."""
        return value if self.parts == 1 else _Alike.apply(value, self.features)  # type: ignore[no-untyped-call]

    def count(self, own: int, like: Tensor) -> int:
        """How many of all features are something, of which ``own`` of this process are; where others are asked, the
        device of ``like`` is waited for."""
        if self.parts == 1:
            return own
        return int(self.features.sum(torch.tensor(own, device=like.device)))

    def every(self, holds: Tensor) -> bool:
        """Whether ``holds [d_sae]`` of all features; where others are asked, the device is waited for."""
        return self.count(int(not bool(holds.all())), holds) == 0

    def all_features(self, values: Tensor) -> Tensor:
        """``values [d_sae]`` of all features, in their order."""
        return values if self.parts == 1 else torch.cat(self.features.gather(values))

    def largest(self, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each row of ``values [..., d_sae]``, of own features, what is among the ``k`` largest of all features.

        Values and places, ``[..., m]``, in no order, and which of them are, ``[..., m]`` bool; None: all.
        """
        found = values.topk(min(k, values.shape[-1]), dim=-1, sorted=False)
        if self.parts == 1:
            return found.values, found.indices, None
        return found.values, found.indices, self.among_largest(found.values, k)

    def among_largest(self, values: Tensor, k: int) -> Tensor:
        """Which of ``values [..., m]``, own candidates, are among the ``k`` largest of the candidates of all.

        Few are told to all others; of many, each row's threshold is found by counts.
        """
        if (self.parts - 1) * k > FEW:
            return self._chosen(values, k, OF_ROWS, self.features.sum, self.features.gather, self.features.rank)
        everywhere = torch.cat(self.features.gather(values), dim=-1)
        best = everywhere.topk(min(k, everywhere.shape[-1]), dim=-1, sorted=False).indices
        chosen = torch.zeros_like(everywhere, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.narrow(-1, self.features.rank * values.shape[-1], values.shape[-1])

    @staticmethod
    def _chosen(
        values: Tensor, wanted: int, digit: int, sum_of_all: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], list[Tensor]], rank: int,
    ) -> Tensor:  # fmt: skip
        """Which of ``values [..., m]`` are among their row's ``wanted`` largest of all processes, of equal ones at the
        threshold the first by process and then by place."""
        keys = sorted_keys(values.detach())
        limit, at_limit = threshold(keys, wanted, keys_bits(values.dtype), digit, sum_of_all)
        limit = limit.unsqueeze(-1)
        ties = keys == limit
        before = torch.stack(gather(ties.sum(-1, dtype=torch.int32))[: rank + 1])[:-1].sum(0)
        return (keys > limit) | (ties & (ties.cumsum(-1) <= (at_limit - before).unsqueeze(-1)))

    # ---- of both

    def everybody(self, own: Tensor) -> list[Tensor]:
        """``own`` of every process of the step, by rows and then by features; of one shape."""
        parts = torch.stack(self.features.gather(own))
        return [part for of_rows in self.rows.gather(parts) for part in of_rows]

    def sum_of_all(self, own: Tensor) -> Tensor:
        """The sum of ``own`` over every process of the step; without a gradient."""
        return self.rows.sum(self.features.sum(own))

    def largest_of_all(self, values: Tensor, wanted: int) -> Tensor:
        """Which of ``values [m]``, own candidates, are among the ``wanted`` largest of those of all processes.

        Of equal ones at the threshold the first are taken: by rows, then by features, then by place.  What is sent does
        not depend on how many candidates there are: see :func:`saekit.distributed.largest.threshold`.
        """
        rank = self.rows.rank * self.parts + self.features.rank
        return self._chosen(values, wanted, OF_ALL, self.sum_of_all, self.everybody, rank)

    def noise(self, rows: int, features: int, generator: torch.Generator) -> Tensor:
        """``[rows, features]``: this process's part of normal numbers that are drawn for all rows and all features."""
        whole = self.n(rows), features * self.parts
        row, feature = sum(self.counts[: self.rows.rank]), self.first_feature(features)
        if self.split and generator.device.type == "cpu":
            own = (row, rows), (feature, features)
            return drawn_part(
                lambda memory: memory.normal_(generator=generator), whole, *own, torch.get_default_dtype()
            )
        drawn = torch.randn(*whole, generator=generator, device=generator.device)
        return drawn[row : row + rows, feature : feature + features]  # other devices draw other numbers for a part


WHOLE = Share()
"""Of one process: all rows and all features."""
