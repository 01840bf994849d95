"""The products of sparse features on a GPU, each in one pass over its entries.

Every number that comes out is summed by one program, in the order of its entries, so it is the same each time, which
sums by atomic additions are not.  Programs go through the columns of a row in blocks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit.kernels import SparseFeatures

__all__ = ["INTERPRETED", "TritonFeatures"]

_BLOCK = 512  # columns of one program


@triton.jit
def _decode(features, values, starts, weights, out, entries, n, width, block: tl.constexpr, wide: tl.constexpr):
    """``out[row] = Σ values weights[features]`` over the entries of each row."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    first, last = tl.load(starts + row), tl.load(starts + row + 1, mask=row + 1 < n, other=entries)
    total = tl.zeros((block,), dtype=wide)
    for entry in range(first, last):
        weight = tl.load(weights + tl.load(features + entry) * width + columns, mask=inside, other=0)
        total += tl.load(values + entry).to(wide) * weight.to(wide)
    tl.store(out + row.to(tl.int64) * width + columns, total, mask=inside)


@triton.jit
def _multiply(vectors, weights, features, starts, out, entries, n, width, block: tl.constexpr, wide: tl.constexpr):
    """``out[entry] = ⟨vectors[row], weights[feature]⟩`` for the entries of each row."""
    row = tl.program_id(0)
    first, last = tl.load(starts + row), tl.load(starts + row + 1, mask=row + 1 < n, other=entries)
    for entry in range(first, last):
        weight = weights + tl.load(features + entry) * width
        total = tl.zeros((block,), dtype=wide)
        for begin in range(0, width, block):
            columns = begin + tl.arange(0, block)
            inside = columns < width
            vector = tl.load(vectors + row.to(tl.int64) * width + columns, mask=inside, other=0)
            total += vector.to(wide) * tl.load(weight + columns, mask=inside, other=0).to(wide)
        tl.store(out + entry, tl.sum(total, axis=0))


@triton.jit
def _add_outer(order, rows, starts, values, vectors, out, entries, d_sae, width, block: tl.constexpr,
               wide: tl.constexpr, replace: tl.constexpr):  # fmt: skip
    """``out[feature] += Σ values[order] vectors[rows]`` over the entries of each feature."""
    feature = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    first, last = tl.load(starts + feature), tl.load(starts + feature + 1, mask=feature + 1 < d_sae, other=entries)
    total = tl.zeros((block,), dtype=wide)
    for place in range(first, last):
        vector = tl.load(vectors + tl.load(rows + place) * width + columns, mask=inside, other=0)
        total += tl.load(values + tl.load(order + place)).to(wide) * vector.to(wide)
    target = out + feature.to(tl.int64) * width + columns
    if not replace:
        total += tl.load(target, mask=inside, other=0).to(wide)
    tl.store(target, total, mask=inside)


INTERPRETED = not isinstance(_decode, triton.JITFunction)
"""Whether Triton's interpreter takes the place of its compiler, which is for tests on CPUs."""


class TritonFeatures(SparseFeatures):
    """Features whose products are made by the programs above."""

    @classmethod
    def of(cls, found: SparseFeatures) -> TritonFeatures:
        """The same features."""
        return cls(found.rows, found.features, found.values, found.n, found.d_sae)

    def decoded(self, decoder: Tensor) -> Tensor:
        decoder = decoder.contiguous()
        width = decoder.shape[1]
        out = decoder.new_empty(self.n, width)
        if self.n:
            with _launched_on(out.device):
                _decode[self.n, triton.cdiv(width, _block(width))](
                    self.features, self.values.contiguous(), self.starts, decoder, out, len(self), self.n, width,
                    **_sizes(width, decoder),
                )  # fmt: skip
        return out

    def inner_products(self, vectors: Tensor, weights: Tensor) -> Tensor:
        out, width = vectors.new_empty(len(self)), weights.shape[1]
        if len(self):
            with _launched_on(out.device):
                _multiply[self.n,](
                    vectors.contiguous(), weights.contiguous(), self.features, self.starts, out, len(self), self.n,
                    width, **_sizes(width, weights),
                )  # fmt: skip
        return out

    def add_outer_products(self, values: Tensor, vectors: Tensor, out: Tensor, *, replace: bool = False) -> None:
        if not out.is_contiguous():
            raise ValueError("what is added to must be in one piece")
        by_feature, width = self._by_feature, out.shape[1]
        with _launched_on(out.device):
            _add_outer[self.d_sae, triton.cdiv(width, _block(width))](
                by_feature.order, by_feature.rows, by_feature.starts, values.contiguous(), vectors.contiguous(), out,
                len(self), self.d_sae, width, replace=replace, **_sizes(width, out),
            )  # fmt: skip


def _launched_on(device: torch.device) -> AbstractContextManager[object]:
    """Around a launch: Triton takes the current GPU and its stream, whichever GPU the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _block(width: int) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(width)))


def _sizes(width: int, like: Tensor) -> dict[str, Any]:
    """Columns of a program, and the type in which it adds."""
    return {"block": _block(width), "wide": tl.float64 if like.dtype == torch.float64 else tl.float32}
