"""Encoding and decoding without gradients, by the kernels of training."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np
import torch
from torch import Tensor

from saekit.kernels.encoder import CHUNK, at_places, dense_above, entries_where
from saekit.kernels.features import Features
from saekit.kernels.gradients import decoded
from saekit.kernels.places import count_where, not_zero, places_where
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspaces, uninitialized

__all__ = ["Decoder", "decoded_rows", "dense_features", "nonzero_features", "reconstructions", "sparse_features"]

_WORTH_KEEPING = 1 / 40  # of the features: an active one takes five times the memory that it has among them


@attrs.frozen(eq=False)
class Decoder:
    """``(f ⊙ scale) W_dec + b_dec``."""

    W_dec: Tensor
    """``[d_sae, d_out]``."""
    b_dec: Tensor | None = None
    """``[d_out]``."""
    scale: Tensor | None = None
    """``[d_sae]``."""

    def __call__(self, features: Features) -> Tensor:
        """``[n, d_out]``."""
        if isinstance(features, SparseFeatures):
            features = features.scaled(self.scale)
        elif self.scale is not None:
            features = features * self.scale
        return decoded(features, self.W_dec, self.b_dec)


Groups = Iterable[tuple[int, Features]]
"""Groups of rows with the number of their first row, as :meth:`saekit.kernels.StepKernel.groups` gives them."""


@attrs.frozen(eq=False)
class _Known:
    """Where features lie that were made dense, and the active ones that they were made of."""

    address: int
    entries: SparseFeatures

    def are(self, features: Tensor) -> bool:
        """Whether ``features [n, d_sae]`` are these and nothing else: whoever has written to them, by whatever way."""
        entries = self.entries
        if features.data_ptr() != self.address or features.shape != entries.shape or not features.is_contiguous():
            return False
        if features.dtype != entries.values.dtype:
            return False
        if count_where(features, not_zero) != int(torch.count_nonzero(entries.values)):  # an entry may be zero
            return False
        return torch.equal(features.view(-1).index_select(0, entries.flat), entries.values)


def dense_features(groups: Groups, n: int, d_sae: int, like: Tensor, memory: Workspaces) -> Tensor:
    """Features ``[n, d_sae]``, on the device and in the type of ``like``."""
    features, empty = memory.result((n, d_sae), like.dtype, like.device)
    few: list[SparseFeatures] | None = [] if like.device.type == "cpu" else None
    memory.known = None
    for start, group in groups:
        part = features[start : start + group.shape[0]]
        if isinstance(group, SparseFeatures):
            group.dense(out=part if empty else part.zero_())
            few = None if few is None or len(group) > _WORTH_KEEPING * part.numel() else [*few, group]
        else:
            part.copy_(group)
            few = None
    if few:
        memory.known = _Known(features.data_ptr(), SparseFeatures.joined(few))
    return features


def sparse_features(groups: Groups, d_sae: int, like: Tensor) -> SparseFeatures:
    """The active features."""
    found = [group if isinstance(group, SparseFeatures) else nonzero_features(group) for _, group in groups]
    if not found:
        return nonzero_features(like.new_zeros(0, d_sae))
    joined = SparseFeatures.joined(found)
    return joined if like.device.type == "cpu" else joined.kept(joined.values != 0)


def reconstructions(groups: Groups, n: int, decoder: Decoder) -> Tensor:
    """Outputs ``[n, d_out]``."""
    W_dec = decoder.W_dec
    output: Tensor | None = None
    for start, group in groups:
        made = decoder(group)
        if len(made) == n:
            return made
        if output is None:
            output = uninitialized((n, W_dec.shape[1]), W_dec.dtype, W_dec.device)
        output[start : start + len(made)] = made
    return W_dec.new_zeros(0, W_dec.shape[1]) if output is None else output


def decoded_rows(decoder: Decoder, features: Tensor, memory: Workspaces) -> Tensor:
    """Outputs ``[n, d_out]`` of ``features [n, d_sae]``.

    Where these are what was encoded last, unchanged, the active ones are not looked for again.
    """
    W_dec, known = decoder.W_dec, memory.known
    flat = features.to(W_dec.dtype)
    if isinstance(known, _Known) and flat.device.type == "cpu" and known.are(flat):
        return decoder(known.entries)
    output = uninitialized((len(flat), W_dec.shape[1]), flat.dtype, flat.device)
    for start, part in zip(range(0, len(flat), CHUNK), flat.split(CHUNK), strict=False):
        output[start : start + len(part)] = decoder(_sparse_if_cheaper(part, dense_above(W_dec)))
    return output


def nonzero_features(features: Tensor) -> SparseFeatures:
    """The entries of ``features [n, d_sae]`` that are not zero."""
    found = entries_where(features != 0)
    assert found is not None
    _, rows, columns = found
    return SparseFeatures(rows, columns, features[rows, columns], *features.shape)


def _sparse_if_cheaper(part: Tensor, limit: float) -> Features:
    if part.device.type != "cpu" or not part.is_contiguous():
        return part
    first = part[: len(part) // 64 + 1]
    if np.count_nonzero(first.numpy()) > limit * first.numel():
        return part
    places = places_where(part, not_zero, int(limit * part.numel()))
    if places is None:
        return part
    flat, rows, columns = at_places(places, part.shape[1])
    return SparseFeatures(rows, columns, part.view(-1).index_select(0, flat), *part.shape)
