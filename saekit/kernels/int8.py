"""Upper bounds of pre-activations by a product of 8-bit integers, for :mod:`saekit.kernels.screen`.

Rows ``x`` and encoder columns ``w`` are rounded to ``x̂ = s q`` and ``ŵ = t p``, with ``q`` and ``p`` integers from -127
to 127 and a step for each row and each feature.  By Cauchy and Schwarz

    |⟨x, w⟩ − s t ⟨q, p⟩| ≤ ‖x − x̂‖ ‖w‖ + ‖x̂‖ ‖w − ŵ‖.

Three things keep that small.  Of the rows the mean of the first ones is subtracted, which the bias takes up: what a
column has in common does not widen the steps.  A coordinate that is large in rows, and small in the encoder, is divided
here and multiplied there by a power of two, which loses nothing.  And the norms are those of what rounding lost indeed.

Divided by ``s t``, each summand of the bound is a number of the row times one of the feature: rounded upwards to small
integers they are more columns of the two matrices, so that the bound is added inside their product, which is exact.
What float32 may lose, here or where a feature is then computed, in whatever order it sums, is counted with the first.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from saekit.kernels.encoder import Encoder
from saekit.kernels.private_torch import int8_products

__all__ = ["MOST_INPUTS", "Int8Bounds"]

MOST_INPUTS = 1 << 16
"""With more, a product might not fit into an integer of 32 bits."""

_BLOCK = 512  # rows of the encoder that are rounded at once, in the cache
_IN_CACHE = 1 << 18  # numbers that become float32 at once
_ALIGNED = 16  # columns are a multiple of this
_LOOKED_AT = 1024  # rows of the encoder that show how large its columns are
_SUMMED = 2.0**-23  # for each number that a product sums in float32, what rounding may cost of the whole: twice as much
_NORM = 1 + 2.0**-10  # more than a norm that was computed in float32 may be too small by
_BIAS = 2.0**-20  # of a sum of a few numbers, likewise
_FACTOR = 12.0  # with it, both have as many digits
_SMALLEST_STEP = 2.0**-50  # below, squares and products might be lost
_POWERS = torch.tensor([2.0**power for power in range(-16, 17)], device="cpu")  # exact, as torch.exp2 need not be


@attrs.define(eq=False)
class _Rounded:
    """The encoder in int8, with the columns of the bound."""

    weights: Tensor
    """``[d_sae, columns]`` int8."""
    center: Tensor
    """``[d_in]``: what is subtracted from rows."""
    divisor: Tensor
    """``[d_in]``: powers of two, by which rows are divided."""
    steps: Tensor
    """``[d_sae]``: ``t``."""
    offset: Tensor
    """``[d_sae]`` int32: what comes of the 128 that is added to the rows' integers."""
    bias: Tensor
    """``[d_sae]``: with what the center gives, and rounded upwards."""
    usable: bool
    """All are numbers, and neither too large nor too small."""


@attrs.define(eq=False)
class Int8Bounds:
    """Upper bounds for pre-activations less a threshold.  It rounds the encoder when it is first used."""

    encoder: Encoder
    scale: Tensor | None = None
    """``[d_sae]``, above zero: what pre-activations are multiplied by."""
    _rounded: _Rounded | None = attrs.field(default=None, init=False)
    _above: Tensor | float | None = attrs.field(default=None, init=False)

    def of(self, rows: Tensor, above: Tensor | float) -> Tensor | None:
        """``[n, d_sae]`` float32, for ``rows [n, d_in]``, in memory that the next product uses again.

        No pre-activation less ``above``, times the scale, is larger, nor what float32 makes of it.  None where rows or
        weights have no such bound: one of them is not finite, or too large or small for its square.
        """
        encoder = self._rounded_encoder(rows, above)
        quantized = self._quantized(rows, encoder) if encoder.usable else None
        if quantized is None:
            return None
        numbers, steps = quantized
        shape = len(rows), self.encoder.d_sae
        products = self.encoder.workspace.scratch("pre", shape, torch.int32, rows.device)
        int8_products(numbers, encoder.weights, out=products)
        bounds = products.view(torch.float32)
        at_once = max(_IN_CACHE // shape[1], 1)
        for part, bound, step in zip(
            products.split(at_once), bounds.split(at_once), steps.split(at_once), strict=True
        ):  # the same memory
            bound.copy_(part.sub_(encoder.offset)).mul_(step)
            torch.addcmul(encoder.bias, bound, encoder.steps, out=bound)
        return bounds

    def _rounded_encoder(self, rows: Tensor, above: Tensor | float) -> _Rounded:
        workspace = self.encoder.workspace  # all screens round into the same memory
        if self._rounded is None or self._above is not above or not workspace.is_owner("rounded", self):
            self._rounded, self._above = self._round(rows, above), above
            workspace.own("rounded", self)
        return self._rounded

    def _round(self, rows: Tensor, above: Tensor | float) -> _Rounded:
        weights = self.encoder.W_enc.T
        d_sae, d_in = weights.shape
        center = rows.mean(0)
        divisor = _divisor(rows - center, weights[:_LOOKED_AT])
        of_row, of_feature = _columns(d_in)
        width = -(-(d_in + of_row + of_feature) // _ALIGNED) * _ALIGNED
        wide = self.encoder.workspace.scratch("rounded", (d_sae, width), torch.int8, weights.device)
        norms, lost, steps, sizes, centered = (weights.new_empty(d_sae) for _ in range(5))
        offset = torch.empty(d_sae, dtype=torch.int32, device=weights.device)
        for start in range(0, d_sae, _BLOCK):
            block = slice(start, start + _BLOCK)
            part = weights[block] if self.scale is None else weights[block] * self.scale[block, None]
            torch.mv(part, center, out=centered[block])
            torch.amax(part.abs(), 1, out=sizes[block])
            part = part * divisor
            steps[block] = part.abs().amax(1) / 127
            short = _rounded_to(part, steps[block, None])
            wide[block, :d_in] = short
            offset[block] = short.sum(1).mul_(128)
            torch.linalg.vector_norm(part, dim=1, out=norms[block])
            torch.linalg.vector_norm(part - short.mul_(steps[block, None]), dim=1, out=lost[block])
        norms, lost = norms * _NORM, lost * _NORM
        divided = torch.where(steps > 0, steps, 1)
        factor_lost, factor_rounded = _factors(d_in)
        _split(norms / divided / factor_lost, wide[:, d_in : d_in + of_row], 127)
        wide[:, d_in + of_row :] = torch.ceil(lost / divided * factor_rounded)[:, None]
        wide[:, d_in + of_row + of_feature :] = 0
        bias = self.encoder.b_enc - above
        least = bias.abs() + 2 * self.encoder.b_enc.abs()  # at least what both are together
        if self.scale is not None:
            bias, least = bias * self.scale, least * self.scale
        raised = norms * ((center / divisor).norm() * (_NORM * (d_in + 32) * _SUMMED))
        bias = bias + centered + raised + (least + centered.abs()) * _BIAS
        sound = (norms + bias).isfinite().all() & _not_too_small(steps, sizes)
        return _Rounded(wide, center, divisor, steps, offset, bias, bool(sound))

    def _quantized(self, rows: Tensor, encoder: _Rounded) -> tuple[Tensor, Tensor] | None:
        """Integers ``[n, columns]`` uint8 and the steps ``[n, 1]`` of ``rows``."""
        n, d_in = rows.shape
        of_row, of_feature = _columns(d_in)
        part = rows - encoder.center
        sizes = part.abs().amax(1, keepdim=True) + rows.abs().amax(1, keepdim=True)
        part /= encoder.divisor
        norms = part.norm(dim=1, keepdim=True) + (rows / encoder.divisor).norm(dim=1, keepdim=True)
        summed = norms * (_NORM * (d_in + 32) * _SUMMED)
        # So wide that what summing may lose, which is much of a row that is almost the center, is a few of them, too.
        steps = torch.maximum(part.abs().amax(1, keepdim=True) / 127, summed * (4 / math.sqrt(d_in)))
        if not bool(norms.isfinite().all() & _not_too_small(steps, sizes)):
            return None
        short = _rounded_to(part, steps)
        divided = torch.where(steps > 0, steps, 1)
        lost = (part - short * steps).norm(dim=1, keepdim=True) * _NORM + summed
        factor_lost, factor_rounded = _factors(d_in)
        wide = torch.zeros(n, encoder.weights.shape[1], dtype=torch.uint8, device=rows.device)
        wide[:, d_in : d_in + of_row] = torch.ceil(lost / divided * factor_lost)
        _split(short.norm(dim=1) * _NORM / factor_rounded, wide[:, d_in + of_row : d_in + of_row + of_feature], 255)
        wide[:, :d_in] = short.add_(128)
        return wide, steps


def _rounded_to(numbers: Tensor, steps: Tensor) -> Tensor:
    """Of each of ``numbers`` how many ``steps`` it is, from -127 to 127, as float32."""
    return (numbers / torch.where(steps > 0, steps, 1)).round_().clamp_(-127, 127)


def _not_too_small(steps: Tensor, sizes: Tensor) -> Tensor:
    """Whether none of the ``steps`` has lost digits, or become zero, but those of what is zero itself by ``sizes``."""
    return ((sizes == 0) | (steps >= _SMALLEST_STEP)).all()


def _divisor(rows: Tensor, weights: Tensor) -> Tensor:
    """Powers of two that leave the columns of both about as large."""
    sizes = rows.square().mean(0), weights.square().mean(0)
    powers = torch.log2(sizes[0] / sizes[1]).nan_to_num(0, 0, 0).div_(4).round_().clamp_(-16, 16)
    return _POWERS.to(rows.device)[powers.long() + 16]


# In steps, rounding loses at most √d / 2 of a feature, and of a row, with what summing may lose, 3 √d / 4.  Norms
# are at most 127 √d.  Each summand of the bound is one column's number, times what others add up to.


def _factors(d_in: int) -> tuple[float, float]:
    """What norms of lost numbers are multiplied by, so that they fill a byte: those of rows, and those of features.  No
    more than leaves digits to the norms that they meet, which are divided by it."""
    return min(255 / (0.8 * math.sqrt(d_in) + 1), _FACTOR), min(127 / (0.52 * math.sqrt(d_in) + 1), _FACTOR)


def _columns(d_in: int) -> tuple[int, int]:
    """How many columns the norms of features take, and those of rows."""
    largest, (lost, rounded) = 128 * math.sqrt(d_in), _factors(d_in)
    return math.ceil(largest / lost / 127) + 1, math.ceil(largest / rounded / 255) + 1


def _split(numbers: Tensor, out: Tensor, largest: int) -> None:
    """Write ``numbers [n]``, rounded upwards, as sums of the columns of ``out [n, m]``, each up to ``largest``."""
    before = torch.arange(out.shape[1], device=out.device) * largest
    out.copy_((numbers.ceil()[:, None] - before).clamp_(0, largest))
