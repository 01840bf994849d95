"""Encoding and decoding without gradients, by the kernels of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from saekit.devices import KERNEL_DEVICES
from saekit.kernels.encoder import CHUNK, dense_above, entries_where, mask_like
from saekit.kernels.gradients import decoded
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import uninitialized, zeros

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = [
    "decoded_rows",
    "dense_features",
    "is_fast",
    "nonzero_features",
    "overridden",
    "reconstructions",
    "sparse_features",
]


def is_fast(sae: SAEModule, x: Tensor) -> bool:
    """Whether the kernels can serve: nobody asks for a gradient, or for another precision."""
    if sae.kernels == "reference" or sae.W_enc.dtype not in (torch.float32, torch.float64):
        return False
    if sae.W_enc.device.type not in KERNEL_DEVICES:
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_functorch_wrapped_tensor(x):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in sae.parameters())):
        return False
    device = sae.W_enc.device.type
    if torch.is_autocast_enabled(device) or overridden(type(sae)) is not None:
        return False
    return sae.why_no_fast_path(training=False) is None


_MATHEMATICS = (
    "centered", "decode", "decoder_norms", "decoder_scale", "encode", "features_of", "losses", "pre_activations",
    "reconstruction", "training_features",
)  # fmt: skip


def overridden(kind: type) -> str | None:
    """Why the fast path that ``kind`` inherits is not its own: it changes the mathematics.  None: it does not.

    The class that defines ``why_no_fast_path`` answers for the mathematics that it has and inherits.
    """
    for owner in kind.__mro__:
        if "why_no_fast_path" in vars(owner):
            return None
        for name in _MATHEMATICS:
            if name in vars(owner):
                return f"{owner.__name__} overrides {name}, and not why_no_fast_path"
    return None


def dense_features(sae: SAEModule, rows: Tensor) -> Tensor:
    """Features ``[..., d_sae]`` of ``rows [..., d_in]``."""
    flat = rows.detach().reshape(-1, sae.d_in).contiguous()
    features = zeros((len(flat), sae.d_sae), flat.dtype, flat.device)
    for start, group in sae.feature_groups(flat):
        part = features[start : start + group.shape[0]]
        if isinstance(group, SparseFeatures):
            group.dense(out=part)
        else:
            part.copy_(group)
    return features.reshape(*rows.shape[:-1], sae.d_sae)


def sparse_features(sae: SAEModule, rows: Tensor) -> SparseFeatures:
    """The active features of ``rows [..., d_in]``."""
    flat = rows.detach().reshape(-1, sae.d_in).contiguous()
    groups = [group if isinstance(group, SparseFeatures) else nonzero_features(group)
              for _, group in sae.feature_groups(flat)]  # fmt: skip
    if not groups:
        return nonzero_features(flat.new_zeros(0, sae.d_sae))
    joined = SparseFeatures.joined(groups)
    return joined if flat.device.type == "cpu" else joined.kept(joined.values != 0)


def reconstructions(sae: SAEModule, rows: Tensor) -> Tensor:
    """``x̂ [..., d_in]`` of ``rows [..., d_in]``."""
    flat = rows.detach().reshape(-1, sae.d_in).contiguous()
    output = uninitialized(tuple(flat.shape), flat.dtype, flat.device)
    for start, group in sae.feature_groups(flat):
        output[start : start + group.shape[0]] = _decoded(sae, group)
    return output.reshape(rows.shape)


def decoded_rows(sae: SAEModule, features: Tensor) -> Tensor:
    """``x̂ [..., d_in]`` of ``features [..., d_sae]``."""
    flat = features.detach().reshape(-1, sae.d_sae).to(sae.W_dec.dtype)
    output = uninitialized((len(flat), sae.d_in), flat.dtype, flat.device)
    for start, part in zip(range(0, len(flat), CHUNK), flat.split(CHUNK), strict=False):
        output[start : start + len(part)] = _decoded(sae, _sparse_if_cheaper(part, dense_above(sae.W_dec)))
    return output.reshape(*features.shape[:-1], sae.d_in)


def nonzero_features(features: Tensor) -> SparseFeatures:
    """The entries of ``features [n, d_sae]`` that are not zero."""
    found = entries_where(features != 0)
    assert found is not None
    _, rows, columns = found
    return SparseFeatures(rows, columns, features[rows, columns], *features.shape)


def _sparse_if_cheaper(part: Tensor, limit: float) -> Tensor | SparseFeatures:
    if part.device.type != "cpu" or not part.is_contiguous():
        return part
    first = part[: len(part) // 64 + 1]
    if np.count_nonzero(first.numpy()) > limit * first.numel():
        return part
    found = entries_where(torch.ne(part, 0, out=mask_like(part)), limit=int(limit * part.numel()))
    if found is None:
        return part
    flat, rows, columns = found
    return SparseFeatures(rows, columns, part.view(-1)[flat], *part.shape)


def _decoded(sae: SAEModule, features: Tensor | SparseFeatures) -> Tensor:
    scale = sae.decoder_scale()
    if isinstance(features, SparseFeatures):
        features = features.scaled(scale)
    elif scale is not None:
        features = features * scale
    return decoded(features, sae.W_dec, sae.b_dec)
