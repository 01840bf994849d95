"""Encoding and decoding without gradients, by the kernels of training."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np
from torch import Tensor

from saekit.kernels.encoder import CHUNK, dense_above, entries_where
from saekit.kernels.features import Features
from saekit.kernels.gradients import decoded
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspace, uninitialized, zeros

__all__ = ["Decoder", "decoded_rows", "dense_features", "nonzero_features", "reconstructions", "sparse_features"]


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


def dense_features(groups: Groups, n: int, d_sae: int, like: Tensor) -> Tensor:
    """Features ``[n, d_sae]``, on the device and in the type of ``like``."""
    features = zeros((n, d_sae), like.dtype, like.device)
    for start, group in groups:
        part = features[start : start + group.shape[0]]
        if isinstance(group, SparseFeatures):
            group.dense(out=part)
        else:
            part.copy_(group)
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
    output = uninitialized((n, W_dec.shape[1]), W_dec.dtype, W_dec.device)
    for start, group in groups:
        output[start : start + group.shape[0]] = decoder(group)
    return output


def decoded_rows(decoder: Decoder, features: Tensor, workspace: Workspace) -> Tensor:
    """Outputs ``[n, d_out]`` of ``features [n, d_sae]``."""
    W_dec = decoder.W_dec
    flat = features.to(W_dec.dtype)
    output = uninitialized((len(flat), W_dec.shape[1]), flat.dtype, flat.device)
    for start, part in zip(range(0, len(flat), CHUNK), flat.split(CHUNK), strict=False):
        output[start : start + len(part)] = decoder(_sparse_if_cheaper(part, dense_above(W_dec), workspace))
    return output


def nonzero_features(features: Tensor) -> SparseFeatures:
    """The entries of ``features [n, d_sae]`` that are not zero."""
    found = entries_where(features != 0)
    assert found is not None
    _, rows, columns = found
    return SparseFeatures(rows, columns, features[rows, columns], *features.shape)


def _sparse_if_cheaper(part: Tensor, limit: float, workspace: Workspace) -> Features:
    if part.device.type != "cpu" or not part.is_contiguous():
        return part
    first = part[: len(part) // 64 + 1]
    if np.count_nonzero(first.numpy()) > limit * first.numel():
        return part
    mask = workspace.mask_like(part).copy_(part)  # whether they are not zero, at half of what a comparison costs
    found = entries_where(mask, limit=int(limit * part.numel()))
    if found is None:
        return part
    flat, rows, columns = found
    return SparseFeatures(rows, columns, part.view(-1)[flat], *part.shape)
