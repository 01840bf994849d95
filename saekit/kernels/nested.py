"""A training step whose first features reconstruct alone, and more of them better: one loss for each level.

With the features in order and levels that end at ``m_1 < … < m_G``, level ``g`` reconstructs with the first ``m_g``:
``x̂_g = Σ_{i < m_g} f_i w_i + b_dec``, and ``loss = Σ_g c_g mean‖x̂_g − y‖²``.  A feature that level ``g`` is the first
to have gets the gradient ``Σ_{h ≥ g} 2 c_h (x̂_h − y) / n``.  So each entry is decoded once, and meets one vector in the
way back, however many levels there are: what they cost is in the rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.devices import at_hand
from saekit.kernels.features import Features
from saekit.kernels.gradients import FeatureGradient, decoded_by_all
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.step import FastStep
from saekit.kernels.workspace import Workspace

__all__ = ["NestedStep"]


class NestedStep(FastStep):
    """A :class:`FastStep` of one group, which has all rows and is sparse.

    :attr:`output` is that of the last level, which has all features.
    """

    def __init__(
        self,
        sae: Any,
        x: Tensor,
        workspace: Workspace,
        *,
        target: Tensor | None = None,
        ends: Sequence[int],
        weights: Sequence[float],
        keep: bool = False,
        row_weights: Tensor | None = None,
    ) -> None:
        """``ends`` are the levels' ``m_g``, rising to ``d_sae``, and ``weights`` their ``c_g``.

        ``keep`` the reconstructions of all levels, as :attr:`outputs`.
        """
        super().__init__(sae, x, workspace, target=target, row_weights=row_weights)
        self._ends, self._of_levels, self._keep = ends, weights, keep
        self.outputs: Sequence[Tensor] = ()
        """``[n, d_out]`` of each level, if they are kept."""
        self.level_errors: Tensor
        """``[levels]``: the mean squared error of each, ``mean_b Σ_d`` with the rows' weights."""

    def add(self, start: int, features: Features, to_pre: FeatureGradient) -> None:
        if not isinstance(features, SparseFeatures) or features.n != len(self.target):
            raise ValueError("levels are made of one sparse group, which has all rows")
        levels, n = len(self._ends), features.n
        by_level, order = self._by_level(features)
        outputs = decoded_by_all(by_level, self.gradients.decoder, None, self._sae.share).view(levels, n, -1)
        outputs[0] += self._sae.b_dec.detach()
        for level in range(1, levels):
            outputs[level] += outputs[level - 1]
        self.output = outputs[-1].clone()
        if self._keep:
            self.outputs = [*outputs[:-1].clone(), self.output]
        gradient = self._errors(outputs)
        self._b_dec += gradient[0].sum(0)
        self._learn(features, by_level, order, gradient.view(levels * n, -1), to_pre)

    def _by_level(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        """The entries of the first level, row by row, then those that the second adds, and so on; and which they were.

        To themselves each level's are rows of their own.
        """
        level = torch.zeros_like(features.features)
        for end in self._ends[
            :-1
        ]:  # to search among them, they would have to be on the device, which would be waited for
            level += features.features >= end
        if at_hand(level.device) and len(self._ends) <= 256:  # numpy sorts bytes in one pass
            order = torch.from_numpy(np.argsort(level.numpy().astype(np.uint8), kind="stable"))
        else:
            order = torch.sort(level, stable=True).indices
        rows = (level * features.n + features.rows)[order]
        entries = features.features[order], features.values[order]
        return SparseFeatures(rows, *entries, len(self._ends) * features.n, features.d_sae), order

    def _errors(self, outputs: Tensor) -> Tensor:
        """From reconstructions ``[levels, n, d_out]`` to the gradients to what each level adds, in the same memory."""
        outputs -= self.target
        squares = torch.linalg.vector_norm(outputs, dim=2).square_()
        if self._weights is not None:
            squares *= self._weights[:, 0]
            outputs *= self._weights
        self.level_errors, self.squares = squares.mean(1), squares[-1]
        for level, weight in enumerate(self._of_levels):
            outputs[level] *= 2 * weight / len(self.target)
        for level in range(len(outputs) - 2, -1, -1):
            outputs[level] += outputs[level + 1]
        return outputs

    def _learn(
        self, features: SparseFeatures, by_level: SparseFeatures, order: Tensor, output: Tensor, to_pre: FeatureGradient
    ) -> None:
        """What :meth:`saekit.kernels.Gradients.add` does, where a row's entries do not all meet the same gradient."""
        found = self.gradients
        found.fired += features.counts()
        if found.of_decoder:
            found.W_dec, new = found.made(found.W_dec, found.decoder)
            by_level.add_outer_products(by_level.values, output, found.W_dec, replace=new)
        if found.of_encoder:
            to_values = torch.empty_like(features.values)
            to_values[order] = by_level.inner_products(output, found.decoder)
            pre = to_pre(to_values, features, slice(0, features.n))
            found.b_enc += features.sums(pre)
            found.W_enc, new = found.made(found.W_enc, found.encoder)
            features.add_outer_products(pre, self.centered, found.W_enc, replace=new)
