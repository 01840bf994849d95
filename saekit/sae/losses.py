"""The terms of the loss.  Every function here is differentiable and takes batches of rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["auxk_loss", "ghost_loss", "sparsity_penalty", "spread", "squared_errors", "variance_ratio"]

_EPS = 1e-6


def squared_errors(output: Tensor, target: Tensor, normalization: Literal["none", "dense_batch"] = "none") -> Tensor:
    """Elementwise ``(output - target)²``, ``[n, d]``.

    ``dense_batch`` divides each row by the distance of its target from the batch's mean (plus 1e-6).
    """
    errors: Tensor = (output - target).pow(2)
    return errors if normalization == "none" else errors / spread(target)


def spread(target: Tensor) -> Tensor:
    """``[n, 1]``: the distance of each row of ``target [n, d]`` from the batch's mean, plus 1e-6."""
    distance: Tensor = (target - target.mean(0, keepdim=True)).norm(dim=-1, keepdim=True)
    return distance + _EPS


def sparsity_penalty(features: Tensor, p: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """``mean_b ‖f ⊙ w‖_p``: features ``[n, d_sae]``, weights ``[d_sae]`` or none.  A scalar."""
    weighted = features if weights is None else features * weights
    norms: Tensor = weighted.abs().sum(-1) if p == 1.0 else weighted.norm(p=p, dim=-1)
    return norms.mean()


def ghost_loss(
    pre: Tensor,
    x: Tensor,
    output: Tensor,
    decoder: Tensor,
    dead: Tensor,
    normalization: Literal["none", "dense_batch"] = "none",
) -> Tensor:
    """Ghost gradients (Jermyn and Templeton, Anthropic, January 2024): dead features learn to predict the residual.

    ``pre [n, d_sae]`` pre-activations, ``x`` and ``output [n, d_in]``, ``decoder [d_sae, d_in]``, ``dead`` features
    as ``[d_sae]`` bool or by their numbers.  The per-row scale and the elementwise ratio to the mse are detached.  A
    scalar; 0 when nothing is dead.
    """
    if dead.dtype == torch.bool:
        dead = dead.nonzero().squeeze(1)
    if not len(dead):
        return x.new_zeros(())
    residual = (x - output).detach()
    ghost = torch.exp(pre[:, dead]) @ decoder[dead]
    scale = residual.norm(dim=-1, keepdim=True) / (_EPS + 2 * ghost.norm(dim=-1, keepdim=True))
    ghost = ghost * scale.detach()
    errors = squared_errors(ghost, residual, normalization)
    ratio = squared_errors(output, x, normalization) / (errors + _EPS)
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
    values, features = compared.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    chosen = torch.zeros_like(pre).scatter(1, features, pre.gather(1, features).where(values > -torch.inf, 0))
    errors = (chosen @ decoder - residual).pow(2).sum(-1)
    there = (dead.sum().to(pre.dtype) / k).clamp_max(1)
    return errors.mean() * (there if shrink else there > 0)


def variance_ratio(x: Tensor, output: Tensor) -> Tensor:
    """The variance of ``x [n, d]`` in units of that of ``x − output``, both summed over ``d``: a scalar, detached.

    AuxK times this weighs, beside ``Σ (x̂ − x)²``, what it weighs in Gao et al. 2024 beside a loss in units of the
    variance of ``x``: there both terms are in units of the variance of their own targets.  0 if nothing is left over.
    """
    x, residual = x.detach(), (x - output).detach()
    whole, left = ((values - values.mean(0)).pow(2).sum() for values in (x, residual))
    ratio: Tensor = (whole / left).nan_to_num(0, posinf=0)
    return ratio
