"""What a feature makes the model say: the tokens whose logits its decoder direction raises and lowers most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.ambient import ambient
from saekit.analysis.directions import LogitPath, feature_directions, logit_path
from saekit.errors import ModelError
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

__all__ = ["output_directions", "output_logits", "why_no_logits"]


def why_no_logits(sae: SAEModule, backend: ModelBackend, sites: Sites | Site) -> str | None:
    """Why nothing can be said of logits, in words; None: a path leads there from what the features write."""
    found = logit_path(sae, backend, sites)
    return found if isinstance(found, str) else None


def output_directions(sae: SAEModule, features: Sequence[int]) -> Tensor:
    """``[features, d_out]``: what an activation of 1 adds to the outputs, see
    :func:`saekit.analysis.directions.feature_directions`."""
    return feature_directions(sae, torch.tensor([*features], dtype=torch.long, device=sae.device))


@ambient()
@torch.no_grad()
def output_logits(
    sae: SAEModule, features: Sequence[int], backend: ModelBackend, sites: Sites | Site | None = None
) -> Tensor:
    """``[features, d_vocab]``: by how much an activation of 1 raises each logit over their mean, on the direct path.

    That path goes from the residual stream to the unembedding past all that lies between; the last normalization is
    left out, so the numbers tell an order, and their unit is arbitrary (the "logit lens" of a direction: nostalgebraist
    2020; Bricken et al. 2023, "Towards monosemanticity").  ``sites`` are the SAE's own, unless others are given; where
    nobody says, it is taken to write to the residual stream.  :class:`saekit.errors.ModelError` without such a path.
    """
    where = sae.info.sites if sites is None else sites
    path = LogitPath(backend.unembedding()[0].detach()) if where is None else logit_path(sae, backend, where)
    if isinstance(path, str):
        raise ModelError(f"nothing can be said of logits: {path}")
    logits = path.logits(output_directions(sae, features))
    return (logits - logits.mean(1, keepdim=True)).float().cpu()
