"""A bfloat16 product that finds the features worth computing in float32, and misses none.

Rounded to bfloat16, rows ``x`` and encoder columns ``w`` lose ``δx`` and ``δw``, so that by Cauchy and Schwarz

    |⟨x, w⟩ − ⟨x̃, w̃⟩| ≤ ‖δx‖ ‖w‖ + ‖x̃‖ ‖δw‖.

The bound is a product of rows with features itself: as two more columns of the bfloat16 matrices it is added inside
their product, and the bias as two others; what summing in float32 may lose is counted with ``δw``.  What comes out
bounds every pre-activation from above.  A feature whose bound is not above the threshold is not active; the others are
computed exactly.  That pays where a CPU multiplies bfloat16 by itself, at more than twice the speed of float32.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from saekit.kernels.encoder import Encoder, entries_where, screen_below
from saekit.kernels.largest import largest_of_each_row, largest_of_groups, number_of_groups
from saekit.kernels.private_torch import has_bfloat16_products
from saekit.kernels.sparse import SparseFeatures
from saekit.precision import current_precision

__all__ = ["Screen", "screen_for", "why_no_screen"]

_EXTRA = 8  # columns beside d_in, of which four are used: a multiple of eight keeps rows aligned
_SUMMED = 2.0**-23  # for each number that a product sums in float32, what rounding may cost of the whole
_BLOCK = 512  # rows of the encoder that are rounded at once, in the cache
_ULP = 2.0**-7  # of bfloat16; rounding moves a number by half of it at most
_LIMIT = 1.5  # times as many candidates as there may be active features: with more, the float32 product costs less
_SMALLEST = 1024  # features; below, the product is cheap anyway


def why_no_screen(device: torch.device, dtype: torch.dtype, d_sae: int) -> str | None:
    """Why products of this kind are not screened; None: they are."""
    if dtype != torch.float32:
        return f"not for {str(dtype).removeprefix('torch.')}"
    if device.type != "cpu":
        return f"not on {device.type}"
    if d_sae < _SMALLEST:
        return f"not for fewer than {_SMALLEST} features"
    if not has_bfloat16_products():
        return "this CPU has no bfloat16 products"
    return "products are in bfloat16 anyway" if current_precision() == "medium" else None


def screen_for(encoder: Encoder, scale: Tensor | None = None) -> Screen | None:
    """A screen for pre-activations, or for those times ``scale [d_sae]``, where it pays."""
    weights = encoder.W_enc.T
    if why_no_screen(weights.device, weights.dtype, encoder.d_sae) is not None or not weights.is_contiguous():
        return None
    return Screen(encoder, scale)


@attrs.define(eq=False)
class _Rounded:
    """The encoder in bfloat16 with the columns of the bound, and the norms that these are made of."""

    weights: Tensor
    norms: Tensor
    lost: Tensor
    raised: Tensor
    """What rounding the bias upwards adds to each bound."""
    finite: bool


@attrs.define(eq=False)
class Screen:
    """Finds the active features of rows.  It rounds the encoder when it is first used, so make one for each step."""

    encoder: Encoder
    scale: Tensor | None = None
    """``[d_sae]``, above zero: what pre-activations are multiplied by."""
    _rounded: _Rounded | None = attrs.field(default=None, init=False)
    _above: Tensor | float | None = attrs.field(default=None, init=False)

    def active(self, rows: Tensor, above: Tensor | float) -> SparseFeatures | None:
        """The pre-activations of ``rows [n, d_in]`` larger than ``above``; None: too many to be worth it."""
        bounds, margins = self._bounds(rows, above)
        if not self._are_numbers(margins):
            return None
        mask = torch.gt(
            bounds.view(torch.int16), 0, out=self.encoder.workspace.mask_like(bounds)
        )  # the sign alone, many times as fast
        candidates = self._exact(rows, mask, int(_LIMIT * screen_below(self.encoder.W_enc) * mask.numel()))
        if candidates is None:
            return None
        limit = above[candidates.features] if isinstance(above, Tensor) and above.dim() else above
        return candidates.kept(candidates.values > limit)

    def top(self, rows: Tensor, k: int) -> SparseFeatures | None:
        """Of each row the ``k`` largest pre-activations above zero, scaled; None: too many come into question."""
        bounds, margins = self._bounds(rows, 0.0)
        assert self._rounded is not None
        n, d_sae = bounds.shape
        groups = number_of_groups(d_sae, k)
        if groups is None or not self._are_numbers(margins):
            return None
        # As integers, numbers above zero are in the same order.
        largest = largest_of_groups(bounds.view(torch.int16), groups).view(torch.bfloat16).float()
        # The largest of a group is at least its bound less twice the margin, whichever of the group it is.
        lost, rounded = margins
        widest = [largest_of_groups(numbers, groups) for numbers in (self._rounded.norms, self._rounded.lost)]
        least = largest * (1 - _ULP) - 2 * (lost * widest[0] + rounded * widest[1])
        least -= largest_of_groups(self._rounded.raised, groups) * (1 + _ULP)
        kth = least.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        threshold = (kth * (1 - 2 * _ULP)).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16().view(torch.int16)
        mask = torch.ge(bounds.view(torch.int16), threshold, out=self.encoder.workspace.mask_like(bounds))
        candidates = self._exact(rows, mask, 6 * k * n)
        if candidates is None:
            return None
        candidates = candidates.scaled(self.scale)
        return largest_of_each_row(candidates.kept(candidates.values > 0), k)

    def _exact(self, rows: Tensor, mask: Tensor, limit: int) -> SparseFeatures | None:
        found = entries_where(mask, limit)
        if found is None:
            return None
        _, places, features = found
        entries = SparseFeatures(places, features, rows.new_empty(0), *mask.shape)
        products = entries.inner_products(rows, self.encoder.W_enc.T)
        return entries.with_values(products.add_(self.encoder.b_enc[features]))

    def _are_numbers(self, margins: tuple[Tensor, Tensor]) -> bool:
        """What is none, or infinite, has no place in a bound."""
        assert self._rounded is not None
        return self._rounded.finite and bool((margins[0] + margins[1]).isfinite().all())

    def _bounds(self, rows: Tensor, above: Tensor | float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Upper bounds ``[n, d_sae]`` in bfloat16, and each row's factors of the margin, ``[n, 1]`` both."""
        encoder = self._rounded_encoder(above)
        n, d_in = rows.shape
        wide = rows.new_zeros(n, d_in + _EXTRA, dtype=torch.bfloat16)
        wide[:, :d_in] = rows
        short = wide[:, :d_in].float()
        lost, norms = (rows - short).norm(dim=1, keepdim=True), short.norm(dim=1, keepdim=True)
        wide[:, d_in : d_in + 2] = 1
        wide[:, d_in + 2 : d_in + 4] = _up(torch.cat([lost, norms], 1))
        out = self.encoder.workspace.scratch("pre", (n, len(encoder.norms)), torch.bfloat16, rows.device)
        return torch.mm(wide, encoder.weights.T, out=out), (lost * (1 + 2 * _ULP), norms * (1 + 2 * _ULP))

    def _rounded_encoder(self, above: Tensor | float) -> _Rounded:
        owners = self.encoder.workspace.owners  # all screens round into the same memory
        if self._rounded is None or self._above is not above or owners.get("rounded") is not self:
            self._rounded, self._above = self._round(above), above
            owners["rounded"] = self
        return self._rounded

    def _round(self, above: Tensor | float) -> _Rounded:
        weights, bias = self.encoder.W_enc.T, self.encoder.b_enc - above
        d_sae, d_in = weights.shape
        wide = self.encoder.workspace.scratch("rounded", (d_sae, d_in + _EXTRA), torch.bfloat16, weights.device)
        norms, lost = weights.new_empty(d_sae), weights.new_empty(d_sae)
        for start in range(0, d_sae, _BLOCK):
            block = slice(start, start + _BLOCK)
            part = weights[block] if self.scale is None else weights[block] * self.scale[block, None]
            short = part.bfloat16()
            wide[block, :d_in] = short
            torch.linalg.vector_norm(part, dim=1, out=norms[block])
            torch.linalg.vector_norm(short.float().sub_(part), dim=1, out=lost[block])
        lost += norms * (d_in * _SUMMED)
        if self.scale is not None:
            bias = bias * self.scale
        high = bias.bfloat16()
        wide[:, d_in] = high
        wide[:, d_in + 1] = _up(bias - high.float() + bias.abs() * (d_in * _SUMMED))
        wide[:, d_in + 2 : d_in + 4] = _up(torch.stack([norms, lost], 1))
        wide[:, d_in + 4 :] = 0
        raised = wide[:, d_in].float() + wide[:, d_in + 1].float() - bias
        finite = bool((norms.sum() + bias.sum()).isfinite())
        return _Rounded(wide, norms * (1 + 2 * _ULP), lost * (1 + 2 * _ULP), raised, finite)


def _up(values: Tensor) -> Tensor:
    """``values`` in bfloat16, rounded to one that is not smaller."""
    return (values + values.abs() * _ULP).bfloat16()
