"""What a feature makes the model say: the tokens whose logits its decoder direction raises and lowers most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.abilities import KnowsResidualStream
from saekit.ambient import ambient
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

__all__ = ["output_logits", "why_no_logits"]


def why_no_logits(sae: SAEModule, backend: ModelBackend, sites: Sites | Site) -> str | None:
    """Why nothing can be said of logits, in words; None: what the features write is in the residual stream."""
    targets = (sites,) if isinstance(sites, Site) else sites.targets
    if len(targets) > 1:
        return f"what is written are several sites, {', '.join(site.name for site in targets)}"
    if not isinstance(backend, KnowsResidualStream):
        return f"the backend of {backend.name!r} does not say which hooks are in the residual stream"
    if targets[0].hook_head_index is not None or not backend.in_residual_stream(targets[0].hook_name):
        return f"{targets[0].name} is not in the residual stream"
    width = len(backend.unembedding()[0])
    return None if width == sae.d_out else f"the unembedding reads vectors of {width}, and the SAE writes {sae.d_out}"


@ambient()
@torch.no_grad()
def output_logits(sae: SAEModule, features: Sequence[int], backend: ModelBackend) -> Tensor:
    """``[features, d_vocab]``: by how much an activation of 1 raises each logit over their mean, on the direct path.

    That path goes from the residual stream to the unembedding past all that lies between; the last normalization is
    left out, so the numbers tell an order, and their unit is arbitrary (the "logit lens" of a direction: nostalgebraist
    2020; Bricken et al. 2023, "Towards monosemanticity").
    """
    chosen = torch.zeros(len(features), sae.d_sae, device=sae.device, dtype=sae.dtype)
    chosen[range(len(features)), list(features)] = 1
    decoded = sae.decode if sae.input_transform is None else sae.reconstruction  # of rows of unit size, then
    directions = decoded(chosen) - decoded(torch.zeros_like(chosen[:1]))
    weights = backend.unembedding()[0].detach()
    logits = directions.to(weights) @ weights
    return (logits - logits.mean(1, keepdim=True)).float().cpu()
