"""Features of which few are active, and the products of a training step that need those alone.

A dense step makes five products of ``n · d_in · d_sae`` numbers.  Where few features are active, the decoder, the
features' gradient and both weight gradients need only the active ones, and the encoder's product is what is left.
``torch.nn.functional.embedding_bag`` is that sparse product on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saekit.devices import at_hand
from saekit.kernels.private_torch import entry_products
from saekit.shapes import by_shapes

__all__ = ["IN_CACHE", "SparseFeatures", "segment_sums"]

IN_CACHE = 1 << 22
"""Numbers of a matrix that the rows of active features are read from at little cost."""
# Features whose weight gradients are made at once: they stay in the cache, and their memory is used again.
_BLOCK = 2048


class _ByFeature(NamedTuple):
    """Entries sorted by feature: which they were, their rows, and where each feature's begin."""

    order: Tensor
    rows: Tensor
    starts: Tensor


@attrs.define(eq=False, slots=False)
class SparseFeatures:
    """Feature activations ``[n, d_sae]`` by their entries: ``values[i]`` of feature ``features[i]`` in row ``rows[i]``.

    The three are of one length, and ``rows`` rise.  What is not an entry is zero; an entry may be, too.
    """

    rows: Tensor
    """``[entries]`` int64."""
    features: Tensor
    """``[entries]`` int64."""
    values: Tensor
    """``[entries]``."""
    n: int
    """Rows."""
    d_sae: int
    """Features."""

    __repr__ = by_shapes

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d_sae)``."""
        return self.n, self.d_sae

    @classmethod
    def joined(cls, groups: Sequence[SparseFeatures]) -> SparseFeatures:
        """``groups`` of rows that follow each other, as one."""
        if len(groups) == 1:
            return groups[0]
        first = 0
        rows = []
        for group in groups:
            rows.append(group.rows + first)
            first += group.n
        features, values = (torch.cat([getattr(group, name) for group in groups]) for name in ("features", "values"))
        return cls(torch.cat(rows), features, values, first, groups[0].d_sae)

    def kept(self, mask: Tensor) -> SparseFeatures:
        """The entries where ``mask [entries]`` is true."""
        return self.at(mask.nonzero().squeeze(1))

    def at(self, places: Tensor) -> SparseFeatures:
        """The entries of the numbers ``places``, which rise."""
        rows, features, values = (each.index_select(0, places) for each in (self.rows, self.features, self.values))
        return type(self)(rows, features, values, self.n, self.d_sae)

    def with_values(self, values: Tensor) -> SparseFeatures:
        """The same entries with other ``values [entries]``."""
        other = type(self)(self.rows, self.features, values, self.n, self.d_sae)
        vars(other).update({name: vars(self)[name] for name in ("starts", "_by_feature") if name in vars(self)})
        return other

    def scaled(self, factors: Tensor | None) -> SparseFeatures:
        """``f ⊙ factors``, for ``factors [d_sae]``; None: as they are."""
        return self if factors is None else self.with_values(self.values * factors.index_select(0, self.features))

    @property
    def flat(self) -> Tensor:
        """``[entries]``: their places in ``f``, flattened."""
        return self.rows * self.d_sae + self.features

    @cached_property
    def starts(self) -> Tensor:
        """``[n]``: the first entry of each row."""
        return _starts(self.rows, self.n)

    @cached_property
    def _by_feature(self) -> _ByFeature:
        if at_hand(self.features.device) and self.d_sae <= 1 << 16:  # numpy sorts 16 bits in one pass
            order = torch.from_numpy(np.argsort(self.features.numpy().astype(np.uint16), kind="stable"))
            ends = torch.bincount(self.features, minlength=self.d_sae).cumsum(0)
            starts = torch.cat([ends.new_zeros(1), ends[:-1]])
            return _ByFeature(order, self.rows.index_select(0, order), starts)
        features, order = torch.sort(self.features, stable=True)
        return _ByFeature(order, self.rows.index_select(0, order), _starts(features, self.d_sae))

    # ---- products

    def decoded(self, decoder: Tensor) -> Tensor:
        """``f W``, ``[n, d]``, for ``decoder [d_sae, d]``."""
        return embedding_bag(self.features, decoder, self.starts, mode="sum", per_sample_weights=self.values)

    def inner_products(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``[entries]``: of each entry ``⟨vectors of its row, weights of its feature⟩``.

        For ``vectors [n, d]`` and ``weights [d_sae, d]``, both with rows in one piece.  Where the vectors are the
        gradient to :meth:`decoded`, this is the gradient to the values.
        """
        if vectors.device.type == "cpu" and weights.numel() > IN_CACHE and len(weights) > len(vectors):
            by_feature = self._by_feature  # each feature's weights are read once, in their order
            features = self.features.index_select(0, by_feature.order)
            products = entry_products(weights, vectors, by_feature.rows, by_feature.starts, features)
            return torch.empty_like(products).index_copy_(0, by_feature.order, products)
        return entry_products(vectors, weights, self.features, self.starts, self.rows)

    def add_outer_products(self, values: Tensor, vectors: Tensor, out: Tensor, *, replace: bool = False) -> None:
        """Add to ``out [d_sae, d]``, for each feature, its entries' ``values [entries]`` times ``vectors [n, d]``.

        ``replace`` overwrites what was there.
        """
        by_feature = self._by_feature
        weights = values.index_select(0, by_feature.order)
        starts, rows = by_feature.starts, by_feature.rows
        if not at_hand(out.device):  # there, memory comes from a pool, and a look at the starts would wait
            product = embedding_bag(rows, vectors, starts, mode="sum", per_sample_weights=weights)
            out.copy_(product) if replace else out.add_(product)
            return
        ends = [*starts[_BLOCK::_BLOCK].tolist(), len(rows)]
        begin = 0
        for block, first, end in zip(out.split(_BLOCK), starts.split(_BLOCK), ends, strict=True):
            part = slice(begin, end)
            product = embedding_bag(rows[part], vectors, first - begin, mode="sum", per_sample_weights=weights[part])
            block.copy_(product) if replace else block.add_(product)
            begin = end

    def sums(self, values: Tensor) -> Tensor:
        """``[d_sae]``: for each feature the sum of its entries' ``values [entries]``."""
        if _adds_in_any_order(values):
            by_feature = self._by_feature
            return segment_sums(values[by_feature.order], by_feature.starts)
        return values.new_zeros(self.d_sae).index_add_(0, self.features, values)

    def row_sums(self, values: Tensor) -> Tensor:
        """``[n]``: for each row the sum of its entries' ``values [entries]``."""
        if _adds_in_any_order(values):
            return segment_sums(values, self.starts)
        return values.new_zeros(self.n).index_add_(0, self.rows, values)

    def counts(self) -> Tensor:
        """``[d_sae]``: the rows in which each feature is above zero."""
        return self.sums((self.values > 0).to(torch.int64))

    # ---- for people

    def dense(self, out: Tensor | None = None) -> Tensor:
        """``[n, d_sae]``; written to ``out``, which holds zeros, where that is given."""
        full = self.values.new_zeros(self.n, self.d_sae) if out is None else out
        if not full.is_contiguous():
            full[self.rows, self.features] = self.values
            return full
        full.view(-1).index_copy_(0, self.flat, self.values)
        return full

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` largest of each row, by size, and the numbers of their features, both ``[n, k]``, in falling order.

        Rows with fewer are filled with zeros, and with -1 where there is no feature.
        """
        values, columns = self.padded(k)
        sizes, places = values.abs().where(values > -torch.inf, -torch.inf).topk(k, dim=1)
        values, there = values.gather(1, places), sizes > 0
        features = torch.full_like(columns, -1) if not len(self) else self.features[columns.gather(1, places)]
        return values.where(there, 0), features.where(there, -1)

    def padded(self, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """Values and entry numbers in a rectangle ``[n, m]``, where ``m`` is the longest row's; else -inf and 0."""
        order = torch.arange(len(self), device=self.rows.device)
        place = order - self.starts.index_select(0, self.rows)
        width = max(int(place.max()) + 1 if len(self) else 0, at_least)
        values = self.values.new_full((self.n, width), -torch.inf)
        numbers = torch.zeros_like(values, dtype=torch.int64)
        place += self.rows * width
        values.view(-1).index_copy_(0, place, self.values)
        numbers.view(-1).index_copy_(0, place, order)
        return values, numbers


def _adds_in_any_order(values: Tensor) -> bool:
    """Whether ``index_add_`` adds by atomic operations, so that sums of these numbers differ from call to call."""
    return not at_hand(values.device) and values.is_floating_point()


def segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """``[segments]``: the sums of ``values [entries]`` from each of ``starts [segments]`` to the next, in their order.

    Nothing waits for the device.
    """
    ends = torch.cat([starts, starts.new_full((1,), len(values))])
    return torch.segment_reduce(values, "sum", offsets=ends, unsafe=True)


def _starts(sorted_keys: Tensor, number: int) -> Tensor:
    """Where each of ``number`` keys begins in ``sorted_keys``; it waits for no device, as counting would."""
    return torch.searchsorted(sorted_keys, torch.arange(number, device=sorted_keys.device))
