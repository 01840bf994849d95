"""Rows in place of gradients: what processes that share a batch agree on after each step.

How gradients are made of the rows of all is the kernels' affair: :mod:`saekit.kernels.outer`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import attrs
import torch

from saekit.distributed.group import Group
from saekit.distributed.sizes import most_entries

__all__ = ["Exchange"]


class _Leaves(Protocol):
    """What has left the weights' gradients to be made: a step."""

    @property
    def entries(self) -> int:
        """Active entries of its rows."""

    def write_weights(self, rows: Group | None = None, counts: Sequence[int] = ()) -> frozenset[str]:
        """Make them of own rows; or of all of ``rows``, of own features, and say of which parameters."""


@attrs.define(eq=False)
class Exchange:
    """Of one step: whether processes that share a batch give each other their rows, on which all agree.

    Every process of them asks, whichever way its own step went.
    """

    rows: Group
    counts: tuple[int, ...]
    """Rows of each, as many."""
    parted: frozenset[str]
    """Parameters of which each updates some features, as many as each, those of its number; of the gradients of the
    others it needs nothing."""
    most: int
    """Entries of each process up to which it is less to send."""
    serves: bool = False
    """Whether the kernel at work says that nobody looks at the weights' gradients before all have agreed."""
    left: _Leaves | None = attrs.field(default=None, init=False)
    summed: frozenset[str] = attrs.field(default=frozenset(), init=False)
    """Parameters whose gradient is that of the whole batch afterwards, of own features."""

    @classmethod
    def of(
        cls, rows: Group, counts: tuple[int, ...], parted: Collection[str], d_sae: int, width: int, itemsize: int
    ) -> Exchange | None:
        """Of a step on ``counts`` rows of the processes ``rows``, of an SAE of ``d_sae`` own features whose
        ``d_in + d_out`` is ``width``; None: it would be more to send, whatever is active."""
        if rows.size == 1 or not parted or len({*counts}) != 1 or d_sae % rows.size:
            return None
        most = most_entries(counts[0], rows.size, d_sae, width, itemsize)
        return None if most < 0 else cls(rows, counts, frozenset(parted), most)

    def leaves(self, weights: Collection[str]) -> bool:
        """Whether a step may leave the gradients of ``weights``, which learn."""
        return self.serves and bool(weights) and self.parted.issuperset(weights)

    def agree(self) -> None:
        """Make what was left: of the rows of all, if every process has left it and none has too many entries."""
        entries = -1 if self.left is None else self.left.entries
        counts = [int(count) for count in self.rows.gather(torch.tensor(entries, device="cpu"))]
        if self.left is not None:
            every = 0 <= min(counts) <= max(counts) <= self.most
            self.summed = self.left.write_weights(self.rows, counts) if every else self.left.write_weights()
            self.left = None
