"""Input transform ``whitening``: activations of one variance in all directions, and without correlations.

With the covariance ``C = E Λ Eᵀ`` of a sample, ``z = (x − μ) E (Λ + ε)^(−1/2) Eᵀ``: of all whitenings the one that
moves activations least (Kessy, Lewin and Strimmer 2018, "Optimal whitening and decorrelation", ZCA), for SAEs in arXiv
2511.13981.  sae-lens leaves out the last ``Eᵀ``, which turns all axes and changes no distance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from saekit import Entry, hookimpl
from saekit.config import check
from saekit.errors import DataError
from saekit.transforms import Affine

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 8192


@attrs.frozen(kw_only=True)
class WhiteningConfig:
    """By the covariance of the first buffer of activations."""

    eps: float = attrs.field(default=1e-3, validator=check(lambda value: value > 0, "above 0"))
    """What is added to the variance in each direction, in units of their mean: directions in which next to nothing
    happens are not blown up to the size of the others."""


@attrs.frozen
class Whitening:
    """The map is folded into the weights."""

    eps: float
    row_wise = False

    def estimated(self, rows: Tensor) -> Affine:
        import torch

        d = rows.shape[1]
        mean, squares = (torch.zeros(shape, dtype=torch.float64, device=rows.device) for shape in ((d,), (d, d)))
        for piece in rows.split(_PIECE):  # rows may be a whole buffer, of which no copy is made
            mean += piece.double().sum(0) / max(len(rows), 1)
        for piece in rows.split(_PIECE):
            centered = piece.double() - mean
            squares.addmm_(centered.T, centered)
        variances, directions = torch.linalg.eigh(squares / max(len(rows) - 1, 1))
        variances = variances.clamp_min(0)  # rounding may have made some negative
        average = float(variances.mean())
        if len(rows) < 2 or not 0 < average < float("inf"):
            raise DataError(
                f"activations cannot be whitened: {len(rows):,} of them have a mean variance of {average:.4g} "
                "(activations.normalize_activations). Look at the site and the model's dtype"
            )
        variances += self.eps * average
        matrix, inverse = ((directions * variances.pow(power)) @ directions.T for power in (-0.5, 0.5))
        return Affine(mean, matrix, inverse)


@hookimpl
def saekit_register_input_transforms() -> Iterable[Entry]:
    summary = "one variance in all directions, by the covariance of the first buffer; folded into the weights"
    yield Entry("whitening", WhiteningConfig, _build, summary=summary)


def _build(config: WhiteningConfig) -> Whitening:
    return Whitening(config.eps)
