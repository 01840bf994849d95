"""Where the features of an SAE point, and the way from there to the logits."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from saekit.abilities import KnowsResidualStream, LeadsToResidualStream
from saekit.ambient import ambient
from saekit.errors import ModelError
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Site, Sites

__all__ = ["LogitPath", "feature_directions", "logit_path", "path_from"]

_TRIED = 8


def _at_least_float32(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def _shape(value: Tensor | None) -> str:
    return "None" if value is None else str(list(value.shape))


@attrs.frozen(eq=False)
class LogitPath:
    """From what an SAE writes to the logits, past all that lies between: ``W_U``, after ``W_O`` or ``W_out``.

    The last normalization and the bias are left out (the "logit lens" of a direction: nostalgebraist 2020).
    """

    unembedding: Tensor = attrs.field(converter=_at_least_float32, repr=_shape)
    """``[d_model, d_vocab]``, in float32 where the model's is narrower: 8 bits do not tell logits apart."""
    output_weights: Tensor | None = attrs.field(default=None, repr=_shape)
    """``[d, d_model]``, of what is not in the residual stream itself."""

    def in_residual_stream(self, directions: Tensor) -> Tensor:
        """``[n, d_model]`` of ``directions [n, d_out]``, in the type of the unembedding."""
        directions = directions.to(self.unembedding)
        return directions if self.output_weights is None else directions @ self.output_weights.to(self.unembedding)

    def logits(self, directions: Tensor) -> Tensor:
        """``[n, d_vocab]``: what ``directions [n, d_out]`` add to the logits."""
        return self.in_residual_stream(directions) @ self.unembedding


def logit_path(sae: SAEModule, backend: ModelBackend, sites: Sites | Site) -> LogitPath | str:
    """The path from what ``sae`` writes to the logits; or why there is none that can be told, in words."""
    targets = (sites,) if isinstance(sites, Site) else sites.targets
    if len(targets) > 1:
        return f"what is written are several sites, {', '.join(site.name for site in targets)}"
    return path_from(targets[0], sae.d_out, backend)


def path_from(site: Site, width: int, backend: ModelBackend) -> LogitPath | str:
    """The path from vectors of ``width`` that are written at ``site``; or why there is none."""
    try:
        unembedding = backend.unembedding()[0].detach()[:, : backend.d_vocab]  # some are padded
    except ModelError as error:
        return str(error)
    knows, head = isinstance(backend, KnowsResidualStream), site.hook_head_index
    if isinstance(backend, KnowsResidualStream) and head is None and backend.in_residual_stream(site.hook_name):
        if len(unembedding) == width:
            return LogitPath(unembedding)
        return f"the unembedding reads vectors of {len(unembedding)}, and the SAE writes {width}"
    weights = backend.to_residual_stream(site.hook_name) if isinstance(backend, LeadsToResidualStream) else None
    if weights is None:
        if not knows:
            return f"the backend of {backend.name!r} does not say which hooks are in the residual stream"
        return f"{site.name} is not in the residual stream, and the backend knows no weights that lead there"
    weights = weights.detach()
    if head is not None:
        weights = weights[head * width : (head + 1) * width]
    if weights.shape == (width, len(unembedding)):
        return LogitPath(unembedding, weights)
    return f"what leads to the residual stream is {list(weights.shape)}, and the SAE writes {width}"


@ambient()
@torch.no_grad()
def feature_directions(sae: SAEModule, features: Tensor | slice) -> Tensor:
    """``[n, d_out]``: by how much an activation of 1 of each of ``features`` changes what is decoded.

    Rows of ``W_dec``, times the scale that an SAE may have of each; of rows of unit size where rows are normalized.
    An architecture that decodes otherwise is asked, feature by feature.
    """
    numbers = torch.arange(sae.d_sae, device=sae.device)[features]
    if not len(numbers):
        return sae.b_dec.new_zeros(0, sae.d_out)
    tried = numbers[torch.linspace(0, len(numbers) - 1, min(_TRIED, len(numbers))).long().to(numbers.device)]
    rows = _rows(sae, tried)
    if rows is not None and torch.allclose(rows, _decoded(sae, tried), rtol=1e-3, atol=1e-3 * float(rows.abs().max())):
        whole = _rows(sae, numbers)
        assert whole is not None
        return whole
    return torch.cat([_decoded(sae, part) for part in numbers.split(64)])


def _rows(sae: SAEModule, features: Tensor) -> Tensor | None:
    weights = getattr(sae, "W_dec", None)
    if not isinstance(weights, Tensor) or weights.shape != (sae.d_sae, sae.d_out):
        return None
    scale = getattr(sae, "scaling_factor", None)
    rows = weights.detach()[features]
    return rows if scale is None else rows * scale.detach()[features, None]


def _decoded(sae: SAEModule, features: Tensor) -> Tensor:
    """What decoding makes of each feature alone, less what it makes of none."""
    chosen = torch.zeros(len(features), sae.d_sae, device=sae.device, dtype=sae.dtype)
    chosen[torch.arange(len(features)), features] = 1
    decoded = sae.decode if sae.input_transform is None else sae.reconstruction  # of rows of unit size, then
    return decoded(chosen) - decoded(torch.zeros_like(chosen[:1]))
