"""Outer products of active features with rows, which are the weight gradients: of own rows, or of those of all.

Processes that share a batch, and each update a part of the features, can add up the gradients that each has of its
rows.  Or each is given the rows of the others, with their active features, and makes its part of the features from all
of them: as many products, none of which anybody makes for nothing.  Then rows are sent, ``n`` of the batch by ``d_in``
and ``d_out``, and not gradients, ``d_sae`` by as much: less where an SAE is wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from saekit.distributed.group import Group
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspace

__all__ = ["Outer"]


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
        features = [group.features for group in groups]
        return cls(type(features[0]).joined(features), pre, x, output)

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
        own_features = type(f)(at_rows, features, of_both[:, 0].contiguous(), n * rows.size, own)
        return Outer(own_features, None if self.pre is None else of_both[:, 1].contiguous(), x, output)


def _of_all(rows: Group, value: Tensor, most: int, name: str, workspace: Workspace) -> Tensor:
    """``value [m, d]`` of every process, each in the first rows of ``most``: ``[processes * most, d]``."""
    found = workspace.scratch(name, (rows.size * most, value.shape[1]), value.dtype, value.device)
    first = rows.rank * most
    found[first : first + len(value)] = value
    rows.spread_parts_(found)
    return found
