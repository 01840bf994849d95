"""Input transform ``layer_norm``: each row minus its mean, in units of its standard deviation.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), 2.1, as their code and sae-lens have
it: ``z = (x − μ) / (σ + ε)`` with the unbiased ``σ``, and back ``z σ + μ``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl
from saekit.config import check

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-5


@attrs.frozen(kw_only=True)
class LayerNormConfig:
    """``(x − μ) / (σ + eps)`` of each row."""

    eps: float = attrs.field(default=_EPS, validator=check(lambda value: value >= 0, "0 or more"))
    """What is added to the standard deviation where it divides.  A row whose numbers are all alike becomes zeros."""


@attrs.frozen
class LayerNorm:
    """See the module."""

    eps: float
    row_wise = True

    @property
    def name_elsewhere(self) -> str | None:
        return "layer_norm" if self.eps == _EPS else None

    def read(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        deviation = _deviation(centered) + self.eps
        return centered / deviation.masked_fill(deviation == 0, 1)

    def written(self, y: Tensor, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return y * _deviation(x - mean) + mean


def _deviation(centered: Tensor) -> Tensor:
    """``[..., 1]``: the unbiased standard deviation; 0 of a single number."""
    squares = centered.square().sum(-1, keepdim=True)
    return (squares / max(centered.shape[-1] - 1, 1)).sqrt()


@hookimpl
def saekit_register_input_transforms() -> Iterable[Entry]:
    summary = "each row minus its mean, by its standard deviation; stays a part of the SAE"
    yield Entry("layer_norm", LayerNormConfig, _build, summary=summary)


def _build(config: LayerNormConfig) -> LayerNorm:
    return LayerNorm(config.eps)
