"""The encoder's product, and the features that it leaves active.

Rows go through in chunks of ``CHUNK``, in one buffer that is used again and again, so that beside the parameters one
``[CHUNK, d_sae]`` buffer and a half is all the memory that a step takes.  Without autograd.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.abilities import SparseActivation
from saekit.kernels.places import not_above, places_where
from saekit.kernels.products import Operands, product
from saekit.kernels.sparse import IN_CACHE, SparseFeatures
from saekit.kernels.workspace import Workspace

__all__ = [
    "CHUNK",
    "PROBE",
    "Encoder",
    "Pending",
    "active_entries",
    "at_places",
    "dense_above",
    "entries_where",
    "screen_below",
]

CHUNK = 1024
"""Rows of one product."""
PROBE = 256
"""Rows that show how many features are active, before a product is screened."""
_ENTRIES = 1 << 18  # of one sparse group at least; and no more than a quarter of a buffer if that is larger
_ENTRY_BYTES = 64


def dense_above(weights: Tensor) -> float:
    """The fraction of active features above which dense products with ``weights`` cost less than sparse ones.

    Measured: see docs/performance.md.
    """
    return 0.16 if weights.numel() <= IN_CACHE else 0.07


def screen_below(weights: Tensor) -> float:
    """The fraction of active features below which a screen costs less than it saves; measured, too."""
    return 0.04 if weights.numel() <= IN_CACHE else 0.02


@attrs.frozen(eq=False)
class Encoder:
    """``x̄ W_enc + b_enc`` by chunks."""

    W_enc: Tensor
    """``[d_in, d_sae]``."""
    b_enc: Tensor
    """``[d_sae]``."""
    workspace: Workspace = attrs.field(factory=Workspace)
    """The memory of its products."""
    by_chunk: bool = False
    """Have the rows of each chunk in a group of their own: other processes, with other features, work on the same."""
    int8: bool = False
    """Whether a screen of its products is to be one of 8-bit integers."""
    _standing: Operands = attrs.field(factory=Operands, init=False)

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return len(self.b_enc)

    @property
    def entries(self) -> int:
        """Sparse entries of one group, about."""
        quarter = CHUNK * self.d_sae * self.W_enc.itemsize // 4
        return max(_ENTRIES, quarter // _ENTRY_BYTES)

    def product(self, rows: Tensor) -> Tensor:
        """``x̄ W_enc`` of ``rows [n, d_in]``, in memory that the next call uses again.

        The bias is left to the caller: a product that begins with it takes a pass over the memory of its own.
        """
        out = self.workspace.scratch("pre", (len(rows), self.d_sae), rows.dtype, rows.device)
        return product(rows, self.W_enc, out=out, standing=self._standing)

    def pre_activations(self, rows: Tensor, scale: Tensor | None = None) -> Tensor:
        """With the bias, times ``scale [d_sae]``; in the same memory."""
        product = self.product(rows)
        if scale is None:
            return product.add_(self.b_enc)
        return torch.addcmul(self.b_enc * scale, product, scale, out=product)


def entries_where(mask: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The places where ``mask [n, m]`` is true: in the flattened tensor, their rows, and their columns.

    None when there are more than ``limit``.
    """
    if mask.device.type != "cpu":
        return at_places(mask.view(-1).nonzero().squeeze(1), mask.shape[1])
    places = mask.numpy().reshape(-1)  # many times as fast as torch's
    if limit is not None and np.count_nonzero(places) > limit:
        return None
    return at_places(torch.from_numpy(np.flatnonzero(places)), mask.shape[1])


def at_places(flat: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places ``flat`` in a flattened tensor ``[n, width]``, their rows, and their columns."""
    rows = torch.div(flat, width, rounding_mode="floor")
    return flat, rows, flat - rows * width


def active_entries(
    product: Tensor, bias: Tensor, above: Tensor | float, limit: float | None = None
) -> SparseFeatures | None:
    """The entries of ``product [n, d_sae] + bias [d_sae]`` larger than ``above``: a number, or one for each feature.

    None when more than the fraction ``limit`` is.
    """
    # Not "above": a number that is none must not pass for a feature that is not active.
    bounds = above - bias
    places: Tensor | None
    if product.device.type == "cpu":
        at_most = None if limit is None else int(limit * product.numel())
        places = places_where(product, not_above(bounds), at_most)
        if places is None:
            return None
    else:
        places = torch.le(product, bounds).logical_not_().view(-1).nonzero().squeeze(1)
    flat, rows, features = at_places(places, product.shape[1])
    values = product.view(-1).index_select(0, flat).add_(bias.index_select(0, features))
    return SparseFeatures(rows, features, values, *product.shape)


@attrs.define
class Pending:
    """Sparse features of chunks that follow each other, until they are enough for one group."""

    encoder: Encoder
    activation: SparseActivation | None = None
    start: int = 0
    chunks: list[SparseFeatures] = attrs.field(factory=list)

    def add(self, start: int, found: SparseFeatures) -> Iterator[tuple[int, SparseFeatures]]:
        if sum(map(len, self.chunks)) + len(found) > self.encoder.entries:
            yield from self.flush()
        if not self.chunks:
            self.start = start
        self.chunks.append(found)
        if self.encoder.by_chunk:
            yield from self.flush()

    def flush(self) -> Iterator[tuple[int, SparseFeatures]]:
        if self.chunks:
            joined = SparseFeatures.joined(self.chunks)
            self.chunks = []
            active = joined.values if self.activation is None else self.activation(joined.values)
            yield self.start, joined.with_values(active)
