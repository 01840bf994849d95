"""The sparsity penalty ``λ mean_b ‖f ⊙ w‖_p`` with its gradients, for features that are nowhere below zero."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

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

    @classmethod
    def of(
        cls, like: Tensor, n: int, coefficient: float, p: float, norms: Tensor | None, *, learns: bool
    ) -> SparsityPenalty:
        """For a batch of ``n`` rows on the device and in the type of ``like``; ``learns``: ``w`` does."""
        gradient = None if norms is None or not learns else torch.zeros_like(norms)
        return cls(n, coefficient, p, norms, like.new_zeros(()), gradient)

    @property
    def value(self) -> Tensor:
        """``mean_b ‖f ⊙ w‖_p``, without λ."""
        return self.total / self.n

    def count(self, features: Features) -> None:
        """Add the norms of a group's rows to :attr:`total`, and what they say of ``w`` to its gradient."""
        if isinstance(features, SparseFeatures):
            self.total += self._norms(features).sum()
            if self.to_norms is not None:
                self.to_norms += features.sums(features.values * self._slope(features))
            return
        for part in features.split(CHUNK // 2):  # a p-norm takes as much memory again
            self.total += self._norms(part).sum()
            if self.to_norms is not None:
                slope = self._slope(part)
                self.to_norms += (part * slope).sum(0) if isinstance(slope, Tensor) else part.sum(0) * slope

    def add_gradient(self, gradient: Tensor, features: Features) -> Tensor:
        """``gradient`` plus that of the penalty to the features' values, in place.

        What it adds where a feature is zero means nothing: activations have no derivative there.
        """
        slope = self._slope(features)
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

    def _norms(self, features: Features) -> Tensor:
        if isinstance(features, Tensor) and self.p == 1 and self.norms is not None:
            return features @ self.norms  # without the memory of their product
        sums = self._sums(features, self._weighted(features))
        return sums if self.p == 1 else sums.pow(1 / self.p)

    def _slope(self, features: Features) -> Tensor | float:
        """``λ/n ∂‖v‖_p / ∂v_i = λ/n (Σ |v|^p)^(1/p − 1) v_i^(p − 1)`` for ``v = f ⊙ w``; 0 where ``v_i`` is."""
        scale = self.coefficient / self.n
        if self.p == 1:
            return scale
        weighted = self._weighted(features)
        sums = self._sums(features, weighted)
        of_rows = sums.pow(1 / self.p - 1).masked_fill_(sums == 0, 0).mul_(scale)
        powers = weighted.pow(self.p - 1).masked_fill_(weighted == 0, 0)
        return powers.mul_(at_rows(of_rows, features))
