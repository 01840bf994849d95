"""The language model's loss with a site's activations replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.evals.pieces import at_once
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site

__all__ = ["spliced_losses"]


@ambient()
@torch.no_grad()
def spliced_losses(
    sae: SAEModule, *, backend: ModelBackend, site: Site, contexts: Tensor, batch_size: int = 16
) -> dict[str, float]:
    """Mean next-token cross-entropy in nats without the SAE, with its reconstruction, and with the site set to zero.

    ``ce_recovered`` is ``(CE_zero − CE_sae) / (CE_zero − CE_clean)``, the ratio of the means.  Only ``site`` is
    touched: one head stays one head.
    """

    def reconstruct(activations: Tensor) -> Tensor:
        vectors = site.extract(activations)  # [b, t, d_in]; contexts stay whole, which hooks of the SAE may count on
        pieces = vectors.split(at_once(sae, vectors.shape[1]))
        values = torch.cat([sae(piece.to(sae.device)).to(vectors.device) for piece in pieces])
        return site.replace(activations, values)

    def zero(activations: Tensor) -> Tensor:
        return site.replace(activations, torch.zeros_like(site.extract(activations)))

    totals = {"ce_loss_without_sae": 0.0, "ce_loss_with_sae": 0.0, "ce_loss_with_ablation": 0.0}
    count = 0
    for tokens in contexts.split(batch_size):
        losses = [
            backend.run(tokens, replace=replace, want="loss").loss
            for replace in ({}, {site.hook_name: reconstruct}, {site.hook_name: zero})
        ]
        for name, loss in zip(totals, losses, strict=True):
            totals[name] += loss.cpu().double().sum().item()  # not every device has float64
        count += losses[0].numel()
    means = {name: total / count for name, total in totals.items()}
    gap = means["ce_loss_with_ablation"] - means["ce_loss_without_sae"]
    recovered = (means["ce_loss_with_ablation"] - means["ce_loss_with_sae"]) / gap if gap else float("nan")
    return means | {"ce_recovered": recovered}
