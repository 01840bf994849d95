"""What a feature does to log probabilities where all that later layers make of it is left out."""

from __future__ import annotations

from typing import Self

import attrs
import torch
from torch import Tensor

from saekit.abilities import KnowsResidualStream, StartsInside
from saekit.analysis.directions import LogitPath, logit_path
from saekit.errors import ModelError
from saekit.protocols import ModelBackend
from saekit.sae.module import SAEModule
from saekit.site import Sites

__all__ = ["DirectPath"]


@attrs.frozen(eq=False)
class DirectPath:
    """From what an SAE writes to ``log softmax(r W_U / std(r))`` for the last residual stream ``r``.

    So the last normalization is there without its weights and its mean, and there is no bias.  The same as in sae_vis
    0.2.21, which sae-lens 3.0.0 calls, but for ``std``: here it is that of a normalization, with a mean over
    ``d_model``; there with a sum that is divided by ``d_model - 1``, which makes all logits smaller by its root.
    """

    last: str
    """The hook of the last residual stream."""
    to_logits: LogitPath

    @classmethod
    def of(cls, sae: SAEModule, backend: ModelBackend, sites: Sites) -> Self:
        """:class:`ModelError` where none is known, with the reason alone."""
        path = logit_path(sae, backend, sites)
        if isinstance(path, str):
            raise ModelError(path)
        last = backend.entry_of(()) if isinstance(backend, StartsInside) else None
        if last is None or not isinstance(backend, KnowsResidualStream) or not backend.in_residual_stream(last):
            raise ModelError(f"the backend of {backend.name!r} does not say which hook holds the last residual stream")
        return cls(last, path)

    def log_changes(self, stream: Tensor, written: Tensor) -> Tensor:
        """``[n, d_vocab]``: by how much log probabilities change where ``written [n, d_out]`` is added.

        ``stream [n, d_model]`` is the last residual stream without that.
        """
        stream = stream.to(self.to_logits.unembedding)
        return self._log_likely(stream + self.to_logits.in_residual_stream(written)) - self._log_likely(stream)

    def _log_likely(self, stream: Tensor) -> Tensor:
        logits = (stream / stream.std(-1, correction=0, keepdim=True)) @ self.to_logits.unembedding
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
