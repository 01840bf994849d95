"""AuxK without autograd: see :func:`saekit.sae.losses.auxk_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.distributed.share import WHOLE, Share
from saekit.kernels.encoder import CHUNK, Encoder, dense_above
from saekit.kernels.features import Features, values_of
from saekit.kernels.gradients import FeatureGradient, Gradients, decoded, decoded_by_all
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.step import FastStep

__all__ = ["add_auxk", "add_fixed_auxk"]


def add_auxk(
    fast: FastStep,
    encoder: Encoder,
    dead: Tensor,
    k: int,
    coefficient: float | Tensor,
    norms: Tensor | None = None,
    *,
    shrink: bool = True,
    trains_encoder: bool = True,
    above_zero: bool = False,
    output: Tensor | None = None,
    share: Share = WHOLE,
) -> Tensor:
    """The loss times ``coefficient``, with its gradients added to those of ``fast``, which has seen all rows.

    ``encoder`` is that of ``fast``; ``output [n, d_out]`` are the reconstructions whose errors are to be explained, by
    default those of ``fast``.

    An autoencoder of the dead features alone, whose numbers are ``dead``, with the residual for a target.  Where it
    does not train the encoder, features are pre-activations after ReLU.  ``share`` says how features are split.
    """
    whole = fast.gradients
    whole_dead = share.count(len(dead), dead)
    weight = coefficient * (min(whole_dead / k, 1.0) if shrink else 1.0)
    part = Gradients(
        whole.encoder[dead],
        whole.decoder[dead],
        encoder.workspace,
        of_encoder=whole.of_encoder and trains_encoder,
        of_decoder=whole.of_decoder,
    )
    encoder, target = Encoder(part.encoder.T, encoder.b_enc[dead], encoder.workspace), fast.target
    scale = None if norms is None else norms[dead]
    total, output = target.new_zeros(()), fast.output if output is None else output
    for start in range(0, len(target), CHUNK):
        rows = slice(start, min(start + CHUNK, len(target)))
        pre = encoder.pre_activations(fast.centered[rows])
        pre = pre.relu_() if above_zero or not trains_encoder else pre
        if share.parts == 1:
            features, to_pre = _chosen(pre, k, scale, dense_above(part.encoder), fast.sparse)
        else:
            features, to_pre = _chosen_of_all(pre, k, scale, whole_dead, share)
        to_pre = _where_above_zero if above_zero else to_pre  # what was not chosen is zero, too
        error = decoded_by_all(features, part.decoder, None, share).sub_(target[rows]).add_(output[rows])
        total += error.pow(2).sum(1).sum()
        part.add(features, fast.centered[rows], error.mul_(2 * weight / len(target)), to_pre, rows)
    whole.b_enc[dead] += part.b_enc
    for name in ("W_enc", "W_dec"):
        gradient, own = getattr(whole, name), getattr(part, name)
        if own is not None:
            gradient.index_add_(0, dead, own)
    return total * (weight / len(target))


def add_fixed_auxk(
    fast: FastStep,
    encoder: Encoder,
    dead: Tensor,
    k: int,
    coefficient: float | Tensor,
    norms: Tensor | None = None,
    *,
    shrink: bool = True,
    trains_encoder: bool = True,
    above_zero: bool = False,
    output: Tensor | None = None,
    among: slice = slice(None),
) -> Tensor:
    """As :func:`add_auxk`, of as many entries however many features are dead: the device is not waited for.

    ``dead [d_sae]`` is a mask, of whose features only those ``among`` count, in one piece.  Where fewer than ``k`` are
    dead, other entries take their places, as zeros without a gradient.  That costs a second product with the encoder.
    """
    whole, target, memory = fast.gradients, fast.target, encoder.workspace
    dead, alive = dead[among], ~dead[among]
    there = (dead.sum().to(target.dtype) / k).clamp_max(1)
    weight = coefficient * (there if shrink else (there > 0).to(target.dtype))
    of_encoder = whole.of_encoder and trains_encoder
    part = Gradients(
        whole.encoder[among], whole.decoder[among], memory, of_encoder=of_encoder, of_decoder=whole.of_decoder
    )
    # What is added to these is added to the whole.
    part.W_enc, part.W_dec = (None if one is None else one[among] for one in (whole.W_enc, whole.W_dec))
    part.b_enc = whole.b_enc[among]
    encoder = Encoder(part.encoder.T, encoder.b_enc[among], memory)
    scale = None if norms is None else norms[among]
    total, output = target.new_zeros(()), fast.output if output is None else output
    for start in range(0, len(target), CHUNK):
        rows = slice(start, min(start + CHUNK, len(target)))
        pre = encoder.pre_activations(fast.centered[rows])
        pre = pre.relu_() if above_zero or not trains_encoder else pre
        limit = dense_above(part.encoder)
        features, to_pre = _chosen_of_dead(pre, alive, min(k, encoder.d_sae), scale, limit, fast.sparse)
        to_pre = _where_above_zero if above_zero else to_pre
        error = decoded(features, part.decoder).sub_(target[rows]).add_(output[rows])
        total += error.pow(2).sum(1).sum()
        part.add(features, fast.centered[rows], error.mul_(2 * weight / len(target)), to_pre, rows)
    return total * (weight / len(target))


def _chosen_of_dead(
    pre: Tensor, alive: Tensor, k: int, scale: Tensor | None, limit: float, sparse: type[SparseFeatures]
) -> tuple[Features, FeatureGradient]:
    """``k`` entries of each row of ``pre [n, d_sae]``: the largest that are not ``alive [d_sae]``, and zeros."""
    n, d_sae = pre.shape
    compared = (pre if scale is None else pre * scale).masked_fill(alive, -torch.inf)
    found = compared.topk(k, dim=1, sorted=False)
    there = found.values > -torch.inf
    if k <= limit * d_sae:
        rows = torch.arange(n, device=pre.device).repeat_interleave(k, output_size=n * k)
        values = pre.gather(1, found.indices).where(there, 0)
        return sparse(rows, found.indices.reshape(-1), values.reshape(-1), n, d_sae), _at_entries(there)
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, found.indices, there)
    return pre.where(mask, 0), _where(mask)


def _at_entries(there: Tensor) -> FeatureGradient:
    def where_there(gradient: Tensor, features: Features, rows: slice) -> Tensor:
        return gradient.where(there.reshape(-1), 0)

    return where_there


def _chosen(
    pre: Tensor, k: int, scale: Tensor | None, limit: float, sparse: type[SparseFeatures]
) -> tuple[Features, FeatureGradient]:
    """The ``k`` largest of each row, whatever their sign, and where the gradient passes."""
    n, dead = pre.shape
    if dead <= k:
        return pre, _everywhere
    columns = (pre if scale is None else pre * scale).topk(k, dim=1, sorted=False).indices
    if k <= limit * dead:
        columns = columns.sort(dim=1).values
        rows = torch.arange(n, device=pre.device).repeat_interleave(k)
        return sparse(rows, columns.reshape(-1), pre.gather(1, columns).reshape(-1), n, dead), _everywhere
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, columns, True)
    return pre.mul_(mask), _where(mask)


def _chosen_of_all(
    pre: Tensor, k: int, scale: Tensor | None, whole_dead: int, share: Share
) -> tuple[Features, FeatureGradient]:
    """The same where other processes have other features: own ones that are among the ``k`` largest of all."""
    if whole_dead <= k:
        return pre, _everywhere
    n, dead = pre.shape
    compared = pre if scale is None else pre * scale
    found = compared.topk(min(k, dead), dim=1, sorted=False)
    values = pre.new_full((n, k), -torch.inf)
    values[:, : found.values.shape[1]] = found.values
    among = share.among_largest(values, k)[:, : found.values.shape[1]]
    mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, found.indices, among)
    return pre.mul_(mask), _where(mask)


def _where(mask: Tensor) -> FeatureGradient:
    def where_chosen(gradient: Tensor, features: Features, rows: slice) -> Tensor:
        first = rows.start % CHUNK
        return gradient.mul_(mask[first : first + len(gradient)])

    return where_chosen


def _everywhere(gradient: Tensor, features: Features, rows: slice) -> Tensor:
    return gradient


def _where_above_zero(gradient: Tensor, features: Features, rows: slice) -> Tensor:
    return gradient.mul_(values_of(features) > 0)
