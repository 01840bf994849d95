"""What a feature makes the model say: the tokens whose logits its decoder direction raises and lowers most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.abilities import KnowsResidualStream, LeadsToResidualStream
from saekit.ambient import ambient
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

__all__ = ["output_directions", "output_logits", "residual_directions", "why_no_logits"]


def why_no_logits(sae: SAEModule, backend: ModelBackend, sites: Sites | Site) -> str | None:
    """Why nothing can be said of logits, in words; None: what the features write comes into the residual stream.

    As it is, or by a product with weights that the backend knows (``W_O`` of an attention, ``W_out`` of an MLP).
    """
    targets = (sites,) if isinstance(sites, Site) else sites.targets
    if len(targets) > 1:
        return f"what is written are several sites, {', '.join(site.name for site in targets)}"
    path = _path(backend, targets[0])
    if path is None:
        if not isinstance(backend, KnowsResidualStream):
            return f"the backend of {backend.name!r} does not say which hooks are in the residual stream"
        in_stream = targets[0].hook_head_index is None and backend.in_residual_stream(targets[0].hook_name)
        if not in_stream:
            return f"{targets[0].name} is not in the residual stream"
    elif len(path) != sae.d_out:
        return f"the weights after {targets[0].name} read vectors of {len(path)}, and the SAE writes {sae.d_out}"
    else:
        return None
    width = len(backend.unembedding()[0])
    return None if width == sae.d_out else f"the unembedding reads vectors of {width}, and the SAE writes {sae.d_out}"


def _path(backend: ModelBackend, site: Site) -> Tensor | None:
    """``[width, d_model]``: the weights by which what is at ``site`` comes into the residual stream; None: as it is."""
    weights = backend.to_residual_stream(site.hook_name) if isinstance(backend, LeadsToResidualStream) else None
    if weights is None or site.hook_head_index is None:
        return None if weights is None else weights.detach()
    heads = _heads_of(weights, site, backend)
    return heads[site.hook_head_index].detach()


def _heads_of(weights: Tensor, site: Site, backend: ModelBackend) -> Tensor:
    """``[head, d_head, d_model]``, by what the hook holds on one token."""
    with torch.no_grad():
        held = backend.run(torch.zeros(1, 1, dtype=torch.long), read=[site.hook_name]).held[site.hook_name]
    heads: Tensor = weights.unflatten(0, (held.shape[-2], held.shape[-1]))
    return heads


@ambient()
@torch.no_grad()
def output_directions(sae: SAEModule, features: Sequence[int]) -> Tensor:
    """``[features, d_out]``: what an activation of 1 adds to the outputs; of rows of unit size, where each has its
    own."""
    chosen = torch.zeros(len(features), sae.d_sae, device=sae.device, dtype=sae.dtype)
    chosen[range(len(features)), list(features)] = 1
    decoded = sae.decode if sae.input_transform is None else sae.reconstruction
    return decoded(chosen) - decoded(torch.zeros_like(chosen[:1]))


@ambient()
@torch.no_grad()
def residual_directions(directions: Tensor, backend: ModelBackend, sites: Sites | Site) -> Tensor:
    """``[features, d_model]``: what ``directions [features, d_out]`` add to the residual stream."""
    target = sites if isinstance(sites, Site) else sites.targets[0]
    path = _path(backend, target)
    return directions if path is None else directions.to(path) @ path


@ambient()
@torch.no_grad()
def output_logits(
    sae: SAEModule, features: Sequence[int], backend: ModelBackend, sites: Sites | Site | None = None
) -> Tensor:
    """``[features, d_vocab]``: by how much an activation of 1 raises each logit over their mean, on the direct path.

    That path goes from the residual stream to the unembedding past all that lies between; the last normalization is
    left out, so the numbers tell an order, and their unit is arbitrary (the "logit lens" of a direction: nostalgebraist
    2020; Bricken et al. 2023, "Towards monosemanticity").  ``sites`` are where the SAE writes; left out, the residual
    stream.
    """
    directions = output_directions(sae, features)
    if sites is not None:
        directions = residual_directions(directions, backend, sites)
    weights = backend.unembedding()[0].detach()
    logits = directions.to(weights) @ weights
    return (logits - logits.mean(1, keepdim=True)).float().cpu()
