"""Outer products of active features with rows, which are the weight gradients: of own rows, or of those of all.

Processes that share a batch, and each update a part of the features, can add up the gradients that each has of its
rows.  Or each is given the rows of the others, with their active features, and makes its part of the features from all
of them: as many products, none of which anybody makes for nothing.  Then rows are sent, ``n`` of the batch by ``d_in``
and ``d_out``, and not gradients, ``d_sae`` by as much: less where an SAE is wide.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor

from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.distributed.sizes import most_entries
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspace

__all__ = ["Exchange", "Outer"]


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
        cls, share: Share, rows: int, parted: Collection[str], d_sae: int, width: int, dtype: torch.dtype
    ) -> Exchange | None:
        """Of a step on own ``rows``, of an SAE of ``d_sae`` own features whose ``d_in + d_out`` is ``width``; None: it
        would be more to send, whatever is active."""
        size, counts = share.rows.size, share.counts
        if size == 1 or not parted or len({*counts}) != 1 or d_sae % size:
            return None
        most = most_entries(rows, size, d_sae, width, dtype.itemsize)
        return None if most < 0 else cls(share.rows, counts, frozenset(parted), most)

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


@attrs.frozen(eq=False)
class Outer:
    """Those of the active ``features`` of some rows: ``fᵀ output``, and ``preᵀ x`` where the encoder learns."""

    features: SparseFeatures
    pre: Tensor | None
    """``[entries]``: the gradient to each entry's pre-activation."""
    x: Tensor
    """``[n, d_in]``: the encoder's input."""
    output: Tensor
    """``[n, d_out]``: the gradient to reconstructions."""

    @classmethod
    def joined(cls, groups: Sequence[Outer]) -> Outer:
        """Of ``groups`` of rows that follow each other, as one."""
        if len(groups) == 1:
            return groups[0]
        pre = None if groups[0].pre is None else torch.cat([group.pre for group in groups if group.pre is not None])
        x, output = torch.cat([group.x for group in groups]), torch.cat([group.output for group in groups])
        return cls(SparseFeatures.joined([group.features for group in groups]), pre, x, output)

    def of_all(self, rows: Group, counts: Sequence[int], workspace: Workspace) -> Outer:
        """Of the rows of all of ``rows``, each of which has as many, and ``counts`` entries; of own features alone.

        They are numbered from this process's first.  What is sent lies in the memory of ``workspace``.
        """
        f, n, most = self.features, self.features.n, max(1, *counts)
        # The memory of pre-activations and of features' gradients, which nobody needs any more.
        x = _of_all(rows, self.x, n, "pre", workspace)
        output = _of_all(rows, self.output, n, "gradient", workspace)
        places = _of_all(rows, torch.stack([f.rows, f.features]).to(torch.int32).T, most, "places", workspace)
        numbers = [f.values] if self.pre is None else [f.values, self.pre]
        values = _of_all(rows, torch.stack(numbers, 1), most, "values", workspace)

        own = f.d_sae // rows.size
        first, found = rows.rank * own, []
        for number, count in enumerate(counts):
            at, with_values = (one[number * most : number * most + count] for one in (places, values))
            mine = ((at[:, 1] >= first) & (at[:, 1] < first + own)).nonzero().squeeze(1)
            at = at.index_select(0, mine).to(torch.int64)
            found.append((at[:, 0] + number * n, at[:, 1] - first, with_values.index_select(0, mine)))
        at_rows, features, of_both = (torch.cat(parts) for parts in zip(*found, strict=True))
        own_features = SparseFeatures(at_rows, features, of_both[:, 0].contiguous(), n * rows.size, own)
        return Outer(own_features, None if self.pre is None else of_both[:, 1].contiguous(), x, output)


def _of_all(rows: Group, value: Tensor, most: int, name: str, workspace: Workspace) -> Tensor:
    """``value [m, d]`` of every process, each in the first rows of ``most``: ``[processes * most, d]``."""
    found = workspace.scratch(name, (rows.size * most, value.shape[1]), value.dtype, value.device)
    first = rows.rank * most
    found[first : first + len(value)] = value
    rows.spread_parts_(found)
    return found
