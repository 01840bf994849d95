"""The gradient of a loss of reconstructions, group of rows by group of rows, without autograd.

With ``x̂ = f W_dec + b_dec``, ``f = act(x̄ W_enc + b_enc)``, ``x̄ = x − b_dec`` and ``g = ∂loss/∂x̂``:

    ∂f = g W_decᵀ + what the loss says of f itself,   ∂pre = ∂f ⊙ act′,
    ∂W_dec = fᵀ g,   ∂W_enc = x̄ᵀ ∂pre,   ∂b_enc = Σ ∂pre,   ∂b_dec = Σ g − W_enc ∂b_enc.

The last is a product with a vector where autograd makes one with a matrix.  Where ``f`` is sparse, all the others need
its entries alone.
"""

from __future__ import annotations

from typing import Protocol

import attrs
import torch
from torch import Tensor

from saekit.distributed.share import Share
from saekit.kernels.encoder import CHUNK
from saekit.kernels.features import Features
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspace

__all__ = ["FeatureGradient", "Gradients", "decoded", "decoded_by_all"]


class FeatureGradient(Protocol):
    """From the gradient to features, which reconstructions give, to that of pre-activations."""

    def __call__(self, gradient: Tensor, features: Features, rows: slice) -> Tensor:
        """For the features of ``rows``: ``gradient`` is of the shape of their values and may be overwritten."""


def decoded(features: Features, decoder: Tensor, bias: Tensor | None = None) -> Tensor:
    """``f W_dec + b_dec``: ``[rows, d_in]`` for ``decoder [d_sae, d_in]``."""
    if isinstance(features, SparseFeatures):
        product = features.decoded(decoder)
        return product if bias is None else product.add_(bias)
    return features @ decoder if bias is None else torch.addmm(bias, features, decoder)


def decoded_by_all(features: Features, decoder: Tensor, bias: Tensor | None, share: Share) -> Tensor:
    """The same of the features of all processes, of which ``features`` and ``decoder`` are this one's."""
    if share.parts == 1:
        return decoded(features, decoder, bias)
    product = share.features.sum_(decoded(features, decoder))
    return product if bias is None else product.add_(bias)


@attrs.define(eq=False)
class Gradients:
    """Sums the gradients to an encoder and a decoder.  What need not learn costs nothing."""

    encoder: Tensor
    """``W_encᵀ [d_sae, d_in]``."""
    decoder: Tensor
    """``W_dec [d_sae, d_in]``, times the scaling factor if there is one."""
    workspace: Workspace = attrs.field(factory=Workspace)
    """The memory of large gradients, and of what is in between."""
    of_encoder: bool = True
    """Whether anything of the encoder learns."""
    of_decoder: bool = True
    """Whether ``W_dec`` learns or a factor of its rows."""
    W_enc: Tensor | None = attrs.field(default=None, init=False)
    """``[d_sae, d_in]``: the gradient to :attr:`encoder`."""
    W_dec: Tensor | None = attrs.field(default=None, init=False)
    """``[d_sae, d_in]``: ``fᵀ g``."""
    b_enc: Tensor = attrs.field(init=False)
    """``[d_sae]``."""
    fired: Tensor = attrs.field(init=False)
    """``[d_sae]``: rows on which each feature was above zero."""

    def __attrs_post_init__(self) -> None:
        self.b_enc = self.encoder.new_zeros(len(self.encoder))
        self.fired = torch.zeros(len(self.encoder), dtype=torch.int64, device=self.encoder.device)

    def add(self, features: Features, x: Tensor, output: Tensor, to_pre: FeatureGradient, rows: slice) -> None:
        """Add those of a group: the encoder's input ``x``, and ``output``, the gradient to its reconstructions.

        Both are ``[n, d_in]``.  Dense ``features`` are used up.
        """
        if isinstance(features, SparseFeatures):
            self._add_sparse(features, x, output, to_pre, rows)
        else:
            self._add_dense(features, x, output, to_pre, rows)

    def _add_sparse(self, f: SparseFeatures, x: Tensor, output: Tensor, to_pre: FeatureGradient, rows: slice) -> None:
        self.fired += f.counts()
        if self.of_decoder:
            self.W_dec, new = self.made(self.W_dec, self.decoder)
            f.add_outer_products(f.values, output, self.W_dec, replace=new)
        if self.of_encoder:
            pre = to_pre(f.inner_products(output, self.decoder), f, rows)
            self.b_enc += f.sums(pre)
            self.W_enc, new = self.made(self.W_enc, self.encoder)
            f.add_outer_products(pre, x, self.W_enc, replace=new)

    def _add_dense(self, f: Tensor, x: Tensor, output: Tensor, to_pre: FeatureGradient, rows: slice) -> None:
        self.fired += self._positive(f)
        if self.of_decoder:
            self.W_dec = self._add_product(self.W_dec, self.decoder, f, output)
        if not self.of_encoder:
            return
        for start in range(0, len(f), CHUNK // 2):  # so that a buffer and a half is enough
            part = slice(start, start + CHUNK // 2)
            those = slice(rows.start + start, min(rows.start + start + CHUNK // 2, rows.stop))
            out = self.workspace.scratch("gradient", (len(f[part]), f.shape[1]), f.dtype, f.device)
            pre = to_pre(torch.mm(output[part], self.decoder.T, out=out), f[part], those)
            self.b_enc += pre.sum(0)
            self.W_enc = self._add_product(self.W_enc, self.encoder, pre, x[part])

    def made(self, gradient: Tensor | None, like: Tensor) -> tuple[Tensor, bool]:
        """The gradient so far, or memory for one like ``like``; and whether it is new."""
        return (self.workspace.gradient_for(like), True) if gradient is None else (gradient, False)

    def _add_product(self, gradient: Tensor | None, like: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``gradient + leftᵀ right``."""
        if gradient is None:
            return torch.mm(left.T, right, out=self.workspace.gradient_for(like))
        return gradient.addmm_(left.T, right)

    def _positive(self, f: Tensor) -> Tensor:
        """``[d_sae]``: rows of ``f [n, d_sae]`` above zero.

        Counted in bytes as far as those go, which is fifty times as fast as counting bools.
        """
        mask = torch.gt(f, 0, out=self.workspace.mask_like(f)).view(torch.uint8)
        return torch.stack([part.sum(0, dtype=torch.uint8) for part in mask.split(255)]).sum(0)
