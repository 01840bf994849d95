"""A product in few bits that finds the features worth computing in float32, and misses none.

Rounded to bfloat16, rows ``x`` and encoder columns ``w`` lose ``δx`` and ``δw``, so that by Cauchy and Schwarz

    |⟨x, w⟩ − ⟨x̃, w̃⟩| ≤ ‖δx‖ ‖w‖ + ‖x̃‖ ‖δw‖.

The bound is a product of rows with features itself: as two more columns of the bfloat16 matrices it is added inside
their product, and the bias as two others; what summing in float32 may lose is counted with ``δw``.  What comes out
bounds every pre-activation from above.  A feature whose bound is not above the threshold is not active; the others are
computed exactly.  That pays where a CPU multiplies bfloat16 by itself, at more than twice the speed of float32.  Where
it multiplies 8-bit integers, whose bound is several times as wide, :mod:`saekit.kernels.int8` makes another one.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from saekit.kernels.encoder import Encoder, entries_where, screen_below
from saekit.kernels.int8 import MOST_INPUTS, Int8Bounds
from saekit.kernels.largest import largest_of_each_row, largest_of_groups, number_of_groups
from saekit.kernels.private_torch import has_bfloat16_products, why_no_int8_products
from saekit.kernels.sparse import SparseFeatures
from saekit.precision import changes_products, current_precision

__all__ = ["Bfloat16Screen", "Int8Screen", "Screen", "screen_for", "why_no_screen"]

_EXTRA = 8  # columns beside d_in, of which four are used: a multiple of eight keeps rows aligned
_SUMMED = 2.0**-23  # for each number that a product sums in float32, what rounding may cost of the whole
_BLOCK = 512  # rows of the encoder that are rounded at once, in the cache
_ULP = 2.0**-7  # of bfloat16; rounding moves a number by half of it at most
_LIMIT = 1.5  # times as many candidates as there may be active features: with more, the float32 product costs less
_SMALLEST = 1024  # features; below, the product is cheap anyway


def why_no_screen(device: torch.device, dtype: torch.dtype, d_sae: int, int8: bool = False) -> str | None:
    """Why products of this kind are not screened, in bfloat16 or in ``int8``; None: they are."""
    if dtype != torch.float32:
        return f"not for {str(dtype).removeprefix('torch.')}"
    if device.type != "cpu":
        return f"not on {device.type}"
    if d_sae < _SMALLEST:
        return f"not for fewer than {_SMALLEST} features"
    if current_precision() == "medium" and changes_products("medium", device.type):
        return "products are in bfloat16 anyway"
    if int8:
        return why_no_int8_products()
    if has_bfloat16_products():
        return None
    more = "; training.kernels=int8 takes one in int8" if why_no_int8_products() is None else ""
    return f"this CPU has no bfloat16 products{more}"


def screen_for(encoder: Encoder, scale: Tensor | None = None) -> Screen | None:
    """A screen for pre-activations, or for those times ``scale [d_sae]``, where it pays."""
    weights = encoder.W_enc.T
    if why_no_screen(weights.device, weights.dtype, encoder.d_sae, encoder.int8) is not None:
        return None
    if not weights.is_contiguous() or (encoder.int8 and weights.shape[1] > MOST_INPUTS):
        return None
    return Int8Screen(encoder, scale) if encoder.int8 else Bfloat16Screen(encoder, scale)


@attrs.define(eq=False)
class Screen:
    """Finds the active features of rows.  It rounds the encoder when it is first used, so make one for each step."""

    encoder: Encoder
    scale: Tensor | None = None
    """``[d_sae]``, above zero: what pre-activations are multiplied by."""

    def active(self, rows: Tensor, above: Tensor | float) -> SparseFeatures | None:
        """The pre-activations of ``rows [n, d_in]`` larger than ``above``; None: too many to be worth it."""
        bounds = self._signs(rows, above)
        if bounds is None:
            return None
        mask = torch.gt(bounds, 0, out=self.encoder.workspace.mask_like(bounds))
        candidates = self._exact(rows, mask, self._most(mask.numel()))
        if candidates is None:
            return None
        limit = above[candidates.features] if isinstance(above, Tensor) and above.dim() else above
        return candidates.kept(candidates.values > limit)

    def top(self, rows: Tensor, k: int) -> SparseFeatures | None:
        """Of each row the ``k`` largest pre-activations above zero, scaled; None: too many come into question."""
        raise NotImplementedError

    def _signs(self, rows: Tensor, above: Tensor | float) -> Tensor | None:
        """``[n, d_sae]``: above zero where bounds are; None where these are no numbers."""
        raise NotImplementedError

    def _largest(self, rows: Tensor, mask: Tensor, k: int, limit: int) -> SparseFeatures | None:
        """Of each row the ``k`` largest of where ``mask`` is true."""
        candidates = self._exact(rows, mask, limit)
        if candidates is None:
            return None
        candidates = candidates.scaled(self.scale)
        return largest_of_each_row(candidates.kept(candidates.values > 0), k)

    def _exact(self, rows: Tensor, mask: Tensor, limit: int) -> SparseFeatures | None:
        found = entries_where(mask, limit)
        if found is None:
            return None
        _, places, features = found
        return self._values(rows, SparseFeatures(places, features, rows.new_empty(0), *mask.shape))

    def _values(self, rows: Tensor, entries: SparseFeatures) -> SparseFeatures:
        products = entries.inner_products(rows, self.encoder.W_enc.T)
        return entries.with_values(products.add_(self.encoder.b_enc[entries.features]))

    def _most(self, products: int) -> int:
        """Candidates among so many products with which a screen still pays, were all of them active."""
        return int(_LIMIT * screen_below(self.encoder.W_enc) * products)


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
class Bfloat16Screen(Screen):
    """By a product in bfloat16."""

    _rounded: _Rounded | None = attrs.field(default=None, init=False)
    _above: Tensor | float | None = attrs.field(default=None, init=False)

    def top(self, rows: Tensor, k: int) -> SparseFeatures | None:
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
        return self._largest(rows, mask, k, 6 * k * n)

    def _signs(self, rows: Tensor, above: Tensor | float) -> Tensor | None:
        bounds, margins = self._bounds(rows, above)
        return bounds.view(torch.int16) if self._are_numbers(margins) else None  # many times as fast

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
        workspace = self.encoder.workspace  # all screens round into the same memory
        if self._rounded is None or self._above is not above or not workspace.is_owner("rounded", self):
            self._rounded, self._above = self._round(above), above
            workspace.own("rounded", self)
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


@attrs.define(eq=False)
class Int8Screen(Screen):
    """By a product of 8-bit integers."""

    _by_int8: Int8Bounds = attrs.field(
        default=attrs.Factory(lambda self: Int8Bounds(self.encoder, self.scale), takes_self=True), init=False
    )

    def top(self, rows: Tensor, k: int) -> SparseFeatures | None:
        bounds, groups = self._by_int8.of(rows, 0.0), number_of_groups(self.encoder.d_sae, k)
        if bounds is None or groups is None:
            return None
        # Of a row, k features are computed, whichever: no smaller one is among the k largest.
        some = self._likely(bounds, k, groups)
        kth = self._values(rows, some).scaled(self.scale).values.view(-1, k).amin(1, keepdim=True)
        if not bool(kth.isfinite().all()):
            return None
        threshold = kth.clamp_min_(torch.finfo(torch.float32).smallest_normal * 2.0**-23)  # the least above zero
        # As integers, numbers above zero are in the same order, and compared faster.
        places = self.encoder.workspace.mask_like(bounds)
        mask = torch.ge(bounds.view(torch.int32), threshold.view(torch.int32), out=places)
        return self._largest(rows, mask, k, self._most(mask.numel()))

    def _likely(self, bounds: Tensor, k: int, groups: int) -> SparseFeatures:
        """Of each row ``k`` features with large bounds: of the ``k`` best groups the largest.  Without values."""
        n, d_sae = bounds.shape
        best = largest_of_groups(bounds, groups).topk(k, dim=1, sorted=False).indices
        width = d_sae // groups
        members = bounds[:, : groups * width].unflatten(1, (width, groups))
        which = members.gather(2, best[:, None].expand(-1, width, -1)).argmax(1)
        features = (which * groups + best).view(-1)
        rows = torch.arange(n, device=bounds.device).repeat_interleave(k)
        return SparseFeatures(rows, features, bounds.new_empty(0), n, d_sae)

    def _signs(self, rows: Tensor, above: Tensor | float) -> Tensor | None:
        bounds = self._by_int8.of(rows, above)
        return None if bounds is None else bounds.view(torch.int32)


def _up(values: Tensor) -> Tensor:
    """``values`` in bfloat16, rounded to one that is not smaller."""
    return (values + values.abs() * _ULP).bfloat16()
