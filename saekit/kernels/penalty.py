"""The sparsity penalty ``λ mean_b ‖f ⊙ w‖_p`` with its gradients, for features that are nowhere below zero."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from saekit.distributed.share import WHOLE, Share
from saekit.kernels.encoder import CHUNK
from saekit.kernels.features import Features, at_features, at_rows, row_sums, values_of
from saekit.kernels.sparse import SparseFeatures

__all__ = ["SparsityPenalty"]


@attrs.define(eq=False)
class SparsityPenalty:
    """What :func:`saekit.sae.losses.sparsity_penalty` is to autograd, group of rows by group of rows."""

    n: int
    """Rows in the batch."""
    coefficient: float
    """λ."""
    p: float
    norms: Tensor | None
    """``w [d_sae]``, or None for ones."""
    total: Tensor
    """The sum of the rows' norms so far: a scalar."""
    to_norms: Tensor | None
    """``[d_sae]``: the gradient to ``w``, where that is wanted."""
    share: Share = WHOLE
    """How features are split; those that are counted are this process's."""
    _start: int = 0
    _of_group: Tensor | None = None
    """``[rows]``: ``Σ |v|^p`` of all features of the group that begins at row ``_start``, where these are split."""

    @classmethod
    def of(
        cls,
        like: Tensor,
        n: int,
        coefficient: float,
        p: float,
        norms: Tensor | None,
        *,
        learns: bool,
        share: Share = WHOLE,
    ) -> SparsityPenalty:
        """For a batch of ``n`` rows on the device and in the type of ``like``; ``learns``: ``w`` does."""
        gradient = None if norms is None or not learns else torch.zeros_like(norms)
        return cls(n, coefficient, p, norms, like.new_zeros(()), gradient, share)

    @property
    def value(self) -> Tensor:
        """``mean_b ‖f ⊙ w‖_p``, without λ; of all features, for which each process asks once."""
        return (self.share.features.sum(self.total) if self.p == 1 else self.total) / self.n

    def count(self, features: Features, start: int = 0) -> None:
        """Add the norms of a group's rows to :attr:`total`, and what they say of ``w`` to its gradient.

        The group begins at row ``start``.
        """
        parts: tuple[Features, ...] = (features,)
        if isinstance(features, Tensor):
            parts = features.split(CHUNK // 2)  # a p-norm takes as much memory again
        if self.p != 1 and self.share.parts > 1:
            own = torch.cat([self._sums(part, self._weighted(part)) for part in parts])
            self._start, self._of_group = start, self.share.features.sum_(own)
        for part in parts:
            rows = slice(start, start + part.shape[0])
            self.total += self._norms(part, rows).sum()
            if self.to_norms is not None:
                self._count_slope(part, self._slope(part, rows))
            start = rows.stop

    def _count_slope(self, features: Features, slope: Tensor | float) -> None:
        assert self.to_norms is not None
        if isinstance(features, SparseFeatures):
            self.to_norms += features.sums(features.values * slope)
        else:
            self.to_norms += (features * slope).sum(0) if isinstance(slope, Tensor) else features.sum(0) * slope

    def add_gradient(self, gradient: Tensor, features: Features, rows: slice | None = None) -> Tensor:
        """``gradient`` plus that of the penalty to the features' values, in place.

        ``features`` are those of ``rows`` of the group that was counted last: of all its rows, where there are none.
        What it adds where a feature is zero means nothing: activations have no derivative there.
        """
        slope = self._slope(features, rows)
        if self.norms is None:
            return gradient.add_(slope)
        return gradient.add_(at_features(self.norms, features) * slope)

    def _weighted(self, features: Features) -> Tensor:
        values = values_of(features)
        return values if self.norms is None else values * at_features(self.norms, features)

    def _sums(self, features: Features, weighted: Tensor) -> Tensor:
        """``[rows]``: ``Σ |v|^p``."""
        powers = weighted if self.p == 1 else weighted.pow(self.p)
        return row_sums(features, powers)

    def _sums_of_all(self, features: Features, weighted: Tensor, rows: slice | None) -> Tensor:
        """The same of the features of all processes."""
        if self._of_group is None:
            return self._sums(features, weighted)
        first = 0 if rows is None else rows.start - self._start
        return self._of_group[first : first + features.shape[0]]

    def _norms(self, features: Features, rows: slice) -> Tensor:
        if isinstance(features, Tensor) and self.p == 1 and self.norms is not None:
            return features @ self.norms  # without the memory of their product
        sums = self._sums_of_all(features, self._weighted(features), rows)
        return sums if self.p == 1 else sums.pow(1 / self.p)

    def _slope(self, features: Features, rows: slice | None) -> Tensor | float:
        """``λ/n ∂‖v‖_p / ∂v_i = λ/n (Σ |v|^p)^(1/p − 1) v_i^(p − 1)`` for ``v = f ⊙ w``; 0 where ``v_i`` is."""
        scale = self.coefficient / self.n
        if self.p == 1:
            return scale
        weighted = self._weighted(features)
        sums = self._sums_of_all(features, weighted, rows)
        of_rows = sums.pow(1 / self.p - 1).masked_fill_(sums == 0, 0).mul_(scale)
        powers = weighted.pow(self.p - 1).masked_fill_(weighted == 0, 0)
        return powers.mul_(at_rows(of_rows, features))
