"""Rows of true features, as a configuration asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.toy.config import ToyConfig

__all__ = ["FeatureDraws"]


class FeatureDraws:
    """Draws rows ``[n, n_features]``: each feature is 0, or fires with its probability and is uniform on (0, 1].

    One uniform number ``u`` decides about a feature that is alone: it fires where ``u < p``.  Two that are correlated
    share theirs; of two that are anticorrelated the first fires where ``u < p``, the other where ``p <= u < p + q``.
    So each fires as often as it should, whatever pairs there are.
    """

    def __init__(self, config: ToyConfig) -> None:
        chance = config.probabilities
        decides, low, high = list(range(config.n_features)), [0.0] * config.n_features, list(chance)
        for one, other in config.correlated_pairs:
            decides[other] = one
        for one, other in config.anticorrelated_pairs:
            decides[other], low[other], high[other] = one, chance[one], chance[one] + chance[other]
        self.dtype = torch.float64 if config.dtype == "float64" else torch.float32
        """The type of the rows."""
        self._decides = torch.tensor(decides)
        self._low, self._high = (torch.tensor(bound, dtype=self.dtype) for bound in (low, high))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The next ``n`` rows of ``generator``, on the CPU."""
        shape = (2, n, len(self._decides))
        decided, size = torch.rand(shape, generator=generator, dtype=self.dtype)
        decided = decided[:, self._decides]
        return torch.where((decided >= self._low) & (decided < self._high), 1 - size, 0.0)
