"""The terms of the loss.  Every function here is differentiable and takes batches of rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saekit.distributed.share import WHOLE, Share

__all__ = ["auxk_loss", "ghost_loss", "sparsity_penalty", "spread", "squared_errors", "variance_ratio"]

_EPS = 1e-6


def squared_errors(
    output: Tensor, target: Tensor, normalization: Literal["none", "dense_batch"] = "none", share: Share = WHOLE
) -> Tensor:
    """Elementwise ``(output - target)²``, ``[n, d]``.

    ``dense_batch`` divides each row by the distance of its target from the batch's mean (plus 1e-6).  Here and below,
    ``share`` is what this process has of the batch and of the features (:attr:`saekit.SAE.share`).
    """
    errors: Tensor = (output - target).pow(2)
    return errors if normalization == "none" else errors / spread(target, share)


def spread(target: Tensor, share: Share = WHOLE) -> Tensor:
    """``[n, 1]``: the distance of each row of ``target [n, d]`` from the batch's mean, plus 1e-6."""
    distance: Tensor = (target - share.row_mean(target)).norm(dim=-1, keepdim=True)
    return distance + _EPS


def sparsity_penalty(features: Tensor, p: float = 1.0, weights: Tensor | None = None, share: Share = WHOLE) -> Tensor:
    """``mean_b ‖f ⊙ w‖_p``: features ``[n, d_sae]``, weights ``[d_sae]`` or none.  A scalar."""
    weighted = features if weights is None else features * weights
    if p == 1.0:
        return share.sum(weighted.abs().sum(-1)).mean()
    norms: Tensor = weighted.norm(p=p, dim=-1)
    if share.parts > 1:
        norms = _norm_of_parts(norms, p, share)
    return norms.mean()


def _norm_of_parts(norms: Tensor, p: float, share: Share) -> Tensor:
    """``‖·‖_p [n]`` of all features, from those of own ones; in units of the largest, as powers may be too large.

    A norm of parts that are all zero has no gradient, as torch has it.
    """
    units = torch.stack(share.features.gather(norms)).amax(0)
    there = units > 0
    units = units.where(there, 1)
    if p == float("inf"):
        return share.sum(norms * (norms == units) / share.features.sum((norms == units).to(norms)).clamp_min(1))
    own = norms > 0
    powers = share.sum((norms.where(own, units) / units).pow(p).where(own, 0))
    return units * powers.where(there, 1).pow(1 / p).where(there, 0)


def ghost_loss(
    pre: Tensor,
    x: Tensor,
    output: Tensor,
    decoder: Tensor,
    dead: Tensor,
    normalization: Literal["none", "dense_batch"] = "none",
    share: Share = WHOLE,
) -> Tensor:
    """Ghost gradients (Jermyn and Templeton, Anthropic, January 2024): dead features learn to predict the residual.

    ``pre [n, d_sae]`` pre-activations, ``x`` and ``output [n, d_in]``, ``decoder [d_sae, d_in]``, ``dead`` features
    as ``[d_sae]`` bool or by their numbers.  The per-row scale and the elementwise ratio to the mse are detached.  A
    scalar; 0 when nothing is dead.
    """
    if dead.dtype == torch.bool:
        dead = dead.nonzero().squeeze(1)
    if not share.count(len(dead), dead):
        return x.new_zeros(())
    residual = (x - output).detach()
    ghost = share.sum(torch.exp(pre[:, dead]) @ decoder[dead])
    scale = residual.norm(dim=-1, keepdim=True) / (_EPS + 2 * ghost.norm(dim=-1, keepdim=True))
    ghost = ghost * scale.detach()
    errors = squared_errors(ghost, residual, normalization, share)
    ratio = squared_errors(output, x, normalization, share) / (errors + _EPS)
    return (errors * ratio.detach()).sum(-1).mean()


def auxk_loss(
    pre: Tensor,
    x: Tensor,
    output: Tensor,
    decoder: Tensor,
    dead: Tensor,
    k: int,
    norms: Tensor | None = None,
    *,
    shrink: bool = True,
    by_size: bool = False,
    above_zero: bool = False,
    share: Share = WHOLE,
) -> Tensor:
    """AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", A.2): dead features learn what is left over.

    The ``k`` largest pre-activations of dead features in each row, by ``pre ⊙ norms`` (``by_size``: by its absolute
    values), reconstruct the residual; with fewer than ``k`` dead, all do, and with ``shrink`` (as sparsify and sae-lens
    do) the loss is less in proportion.  ``above_zero`` takes those below zero for zeros, as dictionary_learning does.
    ``pre [n, d_sae]``, ``x`` and ``output [n, d_in]``, ``decoder [d_sae, d_in]``, ``dead [d_sae]`` bool, ``norms
    [d_sae]``.  A scalar.  Waits for no device.
    """
    residual = (x - output).detach()
    pre = pre.relu() if above_zero else pre
    compared = pre.detach() if norms is None else pre.detach() * norms.detach()
    compared = (compared.abs() if by_size else compared).masked_fill(~dead, -torch.inf)
    values, features, among = share.largest(compared, k)
    there = values > -torch.inf if among is None else among & (values > -torch.inf)
    chosen = torch.zeros_like(pre).scatter(1, features, pre.gather(1, features).where(there, 0))
    errors = (share.sum(chosen @ decoder) - residual).pow(2).sum(-1)
    there = (share.features.sum(dead.sum()).to(pre.dtype) / k).clamp_max(1)
    return errors.mean() * (there if shrink else there > 0)


def variance_ratio(x: Tensor, output: Tensor, share: Share = WHOLE) -> Tensor:
    """The variance of ``x [n, d]`` in units of that of ``x − output``, both summed over ``d``: a scalar, detached.

    AuxK times this weighs, beside ``Σ (x̂ − x)²``, what it weighs in Gao et al. 2024 beside a loss in units of the
    variance of ``x``: there both terms are in units of the variance of their own targets.  0 if nothing is left over.
    """
    x, residual = x.detach(), (x - output).detach()
    whole, left = (share.total((values - share.row_mean(values)).pow(2).sum()) for values in (x, residual))
    ratio: Tensor = (whole / left).nan_to_num(0, posinf=0)
    return ratio
