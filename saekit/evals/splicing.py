"""The language model's loss with the activations at a dictionary's targets replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.evals.pieces import at_once
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites
from saekit.values import Replacement

__all__ = ["spliced_losses"]

_Values: TypeAlias = Mapping[str, Tensor]
"""``[b, t, width]`` by the names of targets."""


@ambient()
@torch.no_grad()
def spliced_losses(
    sae: SAEModule, *, backend: ModelBackend, sites: Sites | Site, contexts: Tensor, batch_size: int = 16
) -> dict[str, float]:
    """Mean next-token cross-entropy in nats without ``sae``, with what it gives at its targets, and with those zero.

    ``ce_recovered`` is ``(CE_zero − CE_sae) / (CE_zero − CE_clean)``, the ratio of the means.  Only the targets among
    ``sites`` are touched, all at once: one head stays one head.  What is put there is made of the inputs as they are
    without anything replaced, wherever in the model they are.
    """
    sites = Sites.one(sites) if isinstance(sites, Site) else sites
    losses_of = _losses_at_one_site if sites == Sites.one(sites.inputs[0]) else _losses
    totals = {"ce_loss_without_sae": 0.0, "ce_loss_with_sae": 0.0, "ce_loss_with_ablation": 0.0}
    count = 0
    for tokens in contexts.split(batch_size):
        losses = losses_of(sae, backend, sites, tokens)
        for name, loss in zip(totals, losses, strict=True):
            totals[name] += loss.cpu().double().sum().item()  # not every device has float64
        count += losses[0].numel()
    means = {name: total / count for name, total in totals.items()}
    gap = means["ce_loss_with_ablation"] - means["ce_loss_without_sae"]
    recovered = (means["ce_loss_with_ablation"] - means["ce_loss_with_sae"]) / gap if gap else float("nan")
    return means | {"ce_recovered": recovered}


def _losses_at_one_site(sae: SAEModule, backend: ModelBackend, sites: Sites, tokens: Tensor) -> list[Tensor]:
    """``[b, t - 1]`` without the SAE, with it, and with zeros: what is put there is made as the model comes by."""
    site = sites.targets[0]

    def reconstruct(activations: Tensor) -> Tensor:
        return site.replace(activations, _outputs(sae, site.extract(activations)))

    def zero(activations: Tensor) -> Tensor:
        return site.replace(activations, torch.zeros_like(site.extract(activations)))

    return [
        backend.run(tokens, replace=replace, want="loss").loss
        for replace in ({}, {site.hook_name: reconstruct}, {site.hook_name: zero})
    ]


def _losses(sae: SAEModule, backend: ModelBackend, sites: Sites, tokens: Tensor) -> list[Tensor]:
    """The same for other sites: the inputs are read in the forward that nothing is put into."""
    clean = backend.run(tokens, read={site.hook_name for site in sites.all}, want="loss")
    names = [site.name for site in sites.targets]
    given = sae.ports.split_target(_outputs(sae, sites.input_of(clean.held))).values()
    zeros = [torch.zeros_like(site.extract(clean.held[site.hook_name])) for site in sites.targets]
    return [clean.loss] + [
        backend.run(tokens, replace=_replacements(sites, dict(zip(names, values, strict=True))), want="loss").loss
        for values in (given, zeros)
    ]


def _outputs(sae: SAEModule, vectors: Tensor) -> Tensor:
    """``[b, t, d_out]`` of ``vectors [b, t, d_in]``; contexts stay whole, which hooks of the SAE may count on."""
    pieces = vectors.split(at_once(sae, vectors.shape[1]))
    return torch.cat([sae(piece.to(sae.device)).to(vectors.device) for piece in pieces])


def _replacements(sites: Sites, values: _Values) -> dict[str, Replacement]:
    """By hooks: what puts ``values`` in the place of the targets."""
    hooks = dict.fromkeys(site.hook_name for site in sites.targets)
    return {hook: _replacement(sites, hook, values) for hook in hooks}


def _replacement(sites: Sites, hook: str, values: _Values) -> Callable[[Tensor], Tensor]:
    return functools.partial(sites.replaced, hook, values=values)
