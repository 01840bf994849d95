"""The encoder's product, and the features that it leaves active.

Rows go through in chunks of ``CHUNK``, in one buffer that is used again and again, so that beside the parameters one
``[CHUNK, d_sae]`` buffer and a half is all the memory that a step takes.  Without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.protocols import SparseActivation
from saekit.sae.memory import scratch
from saekit.sae.sparse import SparseFeatures

if TYPE_CHECKING:
    from saekit.sae.screen import Screen

__all__ = ["CHUNK", "DENSE_ABOVE", "Encoder", "Features", "active_groups", "entries_where", "top_groups"]

CHUNK = 1024
"""Rows of one product."""
DENSE_ABOVE = 0.08
"""The fraction of active features above which dense products cost less than sparse ones (see docs/performance.md)."""
SCREEN_BELOW = 0.03
"""The fraction of active features below which a screen costs less than it saves."""
_PROBE = 256  # rows that show how many features are active, before a product is screened
_ENTRIES = 1 << 18  # of one sparse group at least; and no more than a quarter of a buffer if that is larger
_ENTRY_BYTES = 64

Features: TypeAlias = Tensor | SparseFeatures
"""The features of a group of rows: all of them, ``[rows, d_sae]``, or those that are active."""


@attrs.frozen(eq=False)
class Encoder:
    """``x̄ W_enc + b_enc`` by chunks."""

    W_enc: Tensor
    """``[d_in, d_sae]``."""
    b_enc: Tensor
    """``[d_sae]``."""

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return len(self.b_enc)

    def product(self, rows: Tensor) -> Tensor:
        """The pre-activations of ``rows [n, d_in]``, in memory that the next call uses again."""
        out = scratch("pre", (len(rows), self.d_sae), rows.dtype, rows.device)
        return torch.addmm(self.b_enc, rows, self.W_enc, out=out)


def mask_like(pre: Tensor) -> Tensor:
    """A bool tensor of the shape of ``pre``, in memory that is used again."""
    return scratch("mask", (len(pre), pre.shape[1]), torch.bool, pre.device)


def entries_where(mask: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The places where ``mask [n, m]`` is true: in the flattened tensor, their rows, and their columns.

    None when there are more than ``limit``.
    """
    if mask.device.type != "cpu":
        flat = mask.view(-1).nonzero().squeeze(1)
    else:  # many times as fast as torch's
        places = mask.numpy().reshape(-1)
        if limit is not None and np.count_nonzero(places) > limit:
            return None
        flat = torch.from_numpy(np.flatnonzero(places))
    rows = torch.div(flat, mask.shape[1], rounding_mode="floor")
    return flat, rows, flat - rows * mask.shape[1]


def active_entries(pre: Tensor, above: Tensor | float) -> SparseFeatures | None:
    """The entries of ``pre [n, d_sae]`` that are larger than ``above``: a number, or one for each feature ``[d_sae]``.

    None when so many are that dense products cost less.
    """
    mask = torch.gt(pre, above, out=mask_like(pre))
    found = entries_where(mask, limit=int(DENSE_ABOVE * pre.numel()))
    if found is None:
        return None
    flat, rows, features = found
    return SparseFeatures(rows, features, pre.view(-1)[flat], *pre.shape)


def active_groups(
    encoder: Encoder,
    rows: Tensor,
    activation: SparseActivation,
    *,
    above: Tensor | float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    screen: Screen | None = None,
) -> Iterator[tuple[int, Features]]:
    """The features of ``rows [n, d_in]`` where pre-activations exceed ``above``, group by group with its first row.

    Each group is sparse or, where many features are active, dense: then it holds the buffer, until the next one.
    ``noise`` gives what is added to the pre-activations of so many rows.  The device is not waited for: on one that is
    not a CPU, every group is dense.
    """
    pending = _Pending(encoder, activation)
    start = 0
    screening = False
    while start < len(rows):
        probe = screen is not None and noise is None and start == 0 and len(rows) > _PROBE
        part = rows[start : start + (_PROBE if probe else CHUNK)]
        found = screen.active(part, above) if screening and screen is not None else None
        if found is None:
            pre = encoder.product(part)
            if noise is not None:
                pre += noise(len(part))
            found = active_entries(pre, above) if pre.device.type == "cpu" else None
        if found is None:
            yield from pending.flush()
            yield start, _dense(pre, activation, above)
        else:
            screening |= probe and len(found) < SCREEN_BELOW * len(part) * encoder.d_sae
            yield from pending.add(start, found)
        start += len(part)
    yield from pending.flush()


def _dense(pre: Tensor, activation: SparseActivation, above: Tensor | float) -> Tensor:
    if isinstance(above, Tensor) or above:
        pre.masked_fill_(torch.le(pre, above, out=mask_like(pre)), 0)
    return activation.in_place(pre)


@attrs.define
class _Pending:
    """Sparse features of chunks that follow each other, until they are enough for one group."""

    encoder: Encoder
    activation: SparseActivation | None = None
    start: int = 0
    chunks: list[SparseFeatures] = attrs.field(factory=list)

    def add(self, start: int, found: SparseFeatures) -> Iterator[tuple[int, SparseFeatures]]:
        quarter = CHUNK * self.encoder.d_sae * found.values.itemsize // 4
        if sum(map(len, self.chunks)) + len(found) > max(_ENTRIES, quarter // _ENTRY_BYTES):
            yield from self.flush()
        if not self.chunks:
            self.start = start
        self.chunks.append(found)

    def flush(self) -> Iterator[tuple[int, SparseFeatures]]:
        if self.chunks:
            joined = SparseFeatures.joined(self.chunks)
            self.chunks = []
            active = joined.values if self.activation is None else self.activation(joined.values)
            yield self.start, joined.with_values(active)


# ---- the k largest


def top_groups(
    encoder: Encoder, rows: Tensor, k: int, *, scale: Tensor | None = None, screen: Screen | None = None
) -> Iterator[tuple[int, SparseFeatures]]:
    """The pre-activations of ``rows [n, d_in]`` that are above zero and among their row's ``k`` largest, in groups.

    ``scale [d_sae]``, above zero, multiplies pre-activations before they are compared; the values are without it.
    ``screen`` is one for the same scale.
    """
    pending = _Pending(encoder)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        found = screen.top(part, k) if screen is not None and len(part) > _PROBE else None
        if found is None:
            pre = encoder.product(part)
            found = top_entries(pre if scale is None else pre.mul_(scale), k)
        if scale is not None:
            found = found.with_values(found.values / scale[found.features])
        yield from pending.add(start, found)
    yield from pending.flush()


def top_entries(pre: Tensor, k: int) -> SparseFeatures:
    """The ``k`` largest entries of each row of ``pre [n, d_sae]`` that are above zero.

    On a device that is not a CPU, which is not waited for, there are ``k`` of each row, of which some may be zero.
    """
    n, d_sae = pre.shape
    if pre.device.type != "cpu":
        values, features = pre.topk(k, dim=1, sorted=False)
        rows = torch.arange(n, device=pre.device).repeat_interleave(k, output_size=n * k)
        return SparseFeatures(rows, features.reshape(-1), values.reshape(-1).clamp_min(0), n, d_sae)
    bound = kth_largest_bound(pre, k)
    if bound is None:
        values, features = pre.topk(k, dim=1, sorted=False)
        rows = torch.arange(n).repeat_interleave(k)
        return SparseFeatures(rows, features.reshape(-1), values.reshape(-1), n, d_sae).kept(values.reshape(-1) > 0)
    mask = torch.ge(pre, bound.clamp_min(_tiny(pre)), out=mask_like(pre))
    found = entries_where(mask)
    assert found is not None
    flat, rows, features = found
    return largest_of_each_row(SparseFeatures(rows, features, pre.view(-1)[flat], n, d_sae), k)


def kth_largest_bound(pre: Tensor, k: int) -> Tensor | None:
    """``[n, 1]``: what at least ``k`` of each row of ``pre [n, m]`` reach, near to the k-th largest; None: look at all.

    The k-th largest of the largest of groups, each in a group of its own.
    """
    n, m = pre.shape
    groups = m // 32
    if groups < 2 * k:
        groups = m // 8
    if groups < 2 * k or groups < 1:
        return None
    width = m // groups
    largest = pre[:, : groups * width].unflatten(1, (width, groups)).amax(1)
    return largest.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def largest_of_each_row(entries: SparseFeatures, k: int) -> SparseFeatures:
    """The ``k`` entries of each row with the largest values, in the order of their features."""
    values, numbers = entries.padded()
    if values.shape[1] <= k:
        return entries
    values, places = values.topk(k, dim=1, sorted=False)
    keep = torch.zeros(len(entries), dtype=torch.bool, device=values.device)
    keep[numbers.gather(1, places)[values > -torch.inf]] = True
    return entries.kept(keep)


def _tiny(pre: Tensor) -> float:
    return torch.finfo(pre.dtype).tiny
