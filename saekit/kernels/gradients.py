"""The gradient of a loss of reconstructions, group of rows by group of rows, without autograd.

With ``x̂ = f W_dec + b_dec``, ``f = act(x̄ W_enc + b_enc)``, ``x̄ = x − b_dec`` and ``g = ∂loss/∂x̂``:

    ∂f = g W_decᵀ + what the loss says of f itself,   ∂pre = ∂f ⊙ act′,
    ∂W_dec = fᵀ g,   ∂W_enc = x̄ᵀ ∂pre,   ∂b_enc = Σ ∂pre,   ∂b_dec = Σ g − W_enc ∂b_enc.

The last is a product with a vector where autograd makes one with a matrix.  Where ``f`` is sparse, all the others need
its entries alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor

from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.kernels.encoder import CHUNK
from saekit.kernels.features import Features
from saekit.kernels.outer import Outer
from saekit.kernels.products import Operands, add_product_, product, rounds
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
        made = features.decoded(decoder)
        return made if bias is None else made.add_(bias)
    if bias is not None and not rounds(features):
        return torch.addmm(bias, features, decoder)
    made = product(features, decoder)
    return made if bias is None else made.add_(bias)


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
    by_several: bool = False
    """Have the outer products of several sparse groups made at once: for small groups, each a pass over the memory of
    both gradients."""
    keeps: int = 0
    """Entries up to which they are left for :meth:`make_own`: until there are more, a group is dense, or somebody looks
    at a gradient."""
    _W_enc: Tensor | None = attrs.field(default=None, init=False)
    _W_dec: Tensor | None = attrs.field(default=None, init=False)
    _later: list[Outer] = attrs.field(factory=list, init=False)
    _turned: Tensor = attrs.field(init=False)
    """The decoder's transpose, as one object."""
    _standing: Operands = attrs.field(factory=Operands, init=False)
    b_enc: Tensor = attrs.field(init=False)
    """``[d_sae]``."""
    fired: Tensor = attrs.field(init=False)
    """``[d_sae]``: rows on which each feature was above zero."""

    def __attrs_post_init__(self) -> None:
        self.b_enc = self.encoder.new_zeros(len(self.encoder))
        self.fired = torch.zeros(len(self.encoder), dtype=torch.int64, device=self.encoder.device)
        self._turned = self.decoder.T

    @property
    def W_enc(self) -> Tensor | None:
        """``[d_sae, d_in]``: the gradient to :attr:`encoder`; None: of no group so far."""
        self._settle()
        return self._W_enc

    @W_enc.setter
    def W_enc(self, value: Tensor | None) -> None:
        self._W_enc = value

    @property
    def W_dec(self) -> Tensor | None:
        """``[d_sae, d_in]``: ``fᵀ g``."""
        self._settle()
        return self._W_dec

    @W_dec.setter
    def W_dec(self, value: Tensor | None) -> None:
        self._W_dec = value

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
        pre = None
        if self.of_encoder:
            pre = to_pre(f.inner_products(output, self.decoder), f, rows)
            self.b_enc += f.sums(pre)
        if not (self.by_several or self.keeps):
            self._add_outer(Outer(f, pre, x, output))
            return
        kept = sum(one.features.n for one in self._later)
        if not self.keeps and kept + f.n > max(CHUNK, f.d_sae // 2):
            self._settle()  # what is kept of rows is half as large as one of the gradients, at most
        self._later.append(Outer(f, pre, x, output.clone()))
        if self.entries > self.keeps:
            self._settle()

    def _settle(self) -> None:
        """Make the outer products that are still to be made."""
        later, self._later, self.keeps = self._later, [], 0
        if later:
            self._add_outer(Outer.joined(later))

    @property
    def entries(self) -> int:
        """Active entries of all groups, whose weight gradients are still to be made; -1: some are made."""
        return sum(len(one.features) for one in self._later) if self.keeps else -1

    def make_own(self, rows: Group, counts: Sequence[int]) -> slice:
        """Make the weight gradients of this process's part of the features, from the rows of all of ``rows``, each of
        which has as many, and ``counts`` entries; the other features hold anything then.

        That part of the features.
        """
        later, self._later = self._later, []
        of, own = Outer.joined(later).of_all(rows, counts, self.workspace), len(self.encoder) // rows.size
        part = slice(rows.rank * own, (rows.rank + 1) * own)
        if self.of_decoder:
            self.W_dec, _ = self.made(None, self.decoder)
            of.features.add_outer_products(of.features.values, of.output, self.W_dec[part], replace=True)
        if of.pre is not None:
            self.W_enc, _ = self.made(None, self.encoder)
            of.features.add_outer_products(of.pre, of.x, self.W_enc[part], replace=True)
        return part

    def _add_outer(self, of: Outer) -> None:
        if self.of_decoder:
            self.W_dec, new = self.made(self._W_dec, self.decoder)
            of.features.add_outer_products(of.features.values, of.output, self.W_dec, replace=new)
        if of.pre is not None:
            self.W_enc, new = self.made(self._W_enc, self.encoder)
            of.features.add_outer_products(of.pre, of.x, self.W_enc, replace=new)

    def _add_dense(self, f: Tensor, x: Tensor, output: Tensor, to_pre: FeatureGradient, rows: slice) -> None:
        self._settle()
        self.fired += self._positive(f)
        if self.of_decoder:
            self.W_dec = self._add_product(self.W_dec, self.decoder, f, output)
        if not self.of_encoder:
            return
        for start in range(0, len(f), CHUNK // 2):  # so that a buffer and a half is enough
            part = slice(start, start + CHUNK // 2)
            those = slice(rows.start + start, min(rows.start + start + CHUNK // 2, rows.stop))
            out = self.workspace.scratch("gradient", (len(f[part]), f.shape[1]), f.dtype, f.device)
            pre = to_pre(product(output[part], self._turned, out=out, standing=self._standing), f[part], those)
            self.b_enc += pre.sum(0)
            self.W_enc = self._add_product(self.W_enc, self.encoder, pre, x[part])

    def made(self, gradient: Tensor | None, like: Tensor) -> tuple[Tensor, bool]:
        """The gradient so far, or memory for one like ``like``; and whether it is new."""
        return (self.workspace.gradient_for(like), True) if gradient is None else (gradient, False)

    def _add_product(self, gradient: Tensor | None, like: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``gradient + leftᵀ right``."""
        if gradient is None:
            return product(left.T, right, out=self.workspace.gradient_for(like))
        return add_product_(gradient, left.T, right)

    def _positive(self, f: Tensor) -> Tensor:
        """``[d_sae]``: rows of ``f [n, d_sae]`` above zero.

        Counted in bytes as far as those go, which is fifty times as fast as counting bools.
        """
        mask = torch.gt(f, 0, out=self.workspace.mask_like(f)).view(torch.uint8)
        return torch.stack([part.sum(0, dtype=torch.uint8) for part in mask.split(255)]).sum(0)
