"""A training step without autograd: reconstruction loss, its gradient, and what else the architecture adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saekit.distributed.group import Group
from saekit.distributed.share import Share
from saekit.kernels.features import Features
from saekit.kernels.gradients import FeatureGradient, Gradients, decoded_by_all
from saekit.kernels.sparse import SparseFeatures
from saekit.kernels.workspace import Workspace, uninitialized
from saekit.values import StepOutput

__all__ = ["FastStep", "Layer"]

_LARGE = {"W_enc", "W_dec"}
_OF_WEIGHTS = {*_LARGE, "scaling_factor"}  # what is made of their gradients
_OF_OUTPUTS = {"W_dec", "b_dec", "scaling_factor"}


class Layer(Protocol):
    """What a step needs of a dictionary: its hidden layer."""

    config: Any
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    scaling_factor: nn.Parameter | None
    share: Share

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them; their gradients are left in ``grad``."""

    def decoder_norms(self) -> Tensor:
        """``[d_sae]``."""

    def scaled_decoder(self) -> Tensor:
        """``[d_sae, d_out]``: ``W_dec``, times the scaling factor if there is one."""


class FastStep:
    """Reconstructs a batch group by group, and leaves the loss's gradient in the parameters' ``grad``.

    ::

        fast = FastStep(sae, x, workspace)
        for start, features in groups:
            fast.add(start, features, to_pre)
        return fast.finish(losses=...)
    """

    def __init__(
        self,
        sae: Any,
        x: Tensor,
        workspace: Workspace,
        *,
        target: Tensor | None = None,
        row_weights: Tensor | None = None,
        sparse: type[SparseFeatures] = SparseFeatures,
    ) -> None:
        """On ``x [n, d_in]`` towards ``target [n, d_out]``, or ``x`` itself.

        ``sae`` is a :class:`Layer`; ``row_weights [n, 1]`` multiply each row's squared error.
        """
        if not len(x):
            raise ValueError(f"there are no rows to train on: x is {list(x.shape)}")
        self._sae: Layer = sae
        self._weights, self._workspace = row_weights, workspace
        self._centers: bool = sae.config.apply_b_dec_to_input
        self.sparse = sparse
        """The class of sparse features that are found beside those of :meth:`add`, as those of AuxK."""
        self.target = x if target is None else target
        """``[n, d_out]``."""
        self.centered = x
        """``[n, d_in]``: the encoder's input."""
        if self._centers:
            out = workspace.scratch("centered", tuple(x.shape), x.dtype, x.device)
            self.centered = torch.sub(x, sae.b_dec.detach(), out=out)
        self.output: Tensor
        """``[n, d_out]``: reconstructions, as far as they are made."""
        self.squares = x.new_zeros(len(x))
        """``[n]``: each row's squared error, weighted."""
        self._seen = 0
        learns = {name for name, parameter in self._sae.named_parameters() if parameter.requires_grad}
        self._exchange = self._sae.share.exchange
        leaves = self._exchange is not None and self._exchange.leaves(learns & _LARGE)
        self.gradients = Gradients(
            self._sae.W_enc.detach().T,
            self._sae.scaled_decoder().detach(),
            workspace,
            of_encoder=bool(learns - _OF_OUTPUTS) or ("b_dec" in learns and self._centers),
            of_decoder=bool(learns & {"W_dec", "scaling_factor"}),
            by_several=self._sae.share.parts > 1,  # whose groups are single chunks
            keeps=self._exchange.most if self._exchange is not None and leaves else 0,
        )
        self._b_dec = torch.zeros_like(self._sae.b_dec)

    def add(self, start: int, features: Features, to_pre: FeatureGradient) -> None:
        """A group of rows that begins at row ``start``.

        ``to_pre`` gives the gradient to the encoder's products from that to features.  It is not asked where nothing of
        the encoder learns.
        """
        rows = slice(start, start + features.shape[0])
        self._seen += features.shape[0]
        target = self.target[rows]
        output = decoded_by_all(features, self.gradients.decoder, self._sae.b_dec.detach(), self._sae.share)
        if len(target) == len(self.target):
            self.output = output
        else:
            if start == 0:
                self.output = uninitialized(tuple(self.target.shape), target.dtype, target.device)
            self.output[rows] = output
        out = self._workspace.scratch("error", tuple(target.shape), target.dtype, target.device)
        error = torch.sub(output, target, out=out)
        squares = torch.linalg.vector_norm(error, dim=1, keepdim=True).square_()
        if self._weights is not None:
            squares *= self._weights[rows]
            error *= self._weights[rows]
        self.squares[rows] = squares[:, 0]
        gradient = error.mul_(2 / len(self.target))
        self._b_dec += gradient.sum(0)
        self.gradients.add(features, self.centered[rows], gradient, to_pre, rows)

    def add_to_b_dec(self, gradient: Tensor) -> None:
        """Add ``gradient [d_out]``, what another reconstruction than :attr:`output` says of the ``b_dec`` in it."""
        self._b_dec += gradient

    @property
    def mse(self) -> Tensor:
        """``mean_b Σ_d (ŷ − y)²`` with the rows' weights: a scalar."""
        return self.squares.mean()

    def finish(
        self,
        losses: Mapping[str, Tensor],
        *,
        weights: Iterable[float],
        coefficients: Mapping[str, float | Tensor] | None = None,
        metrics: Mapping[str, float | Tensor] | None = None,
        to_decoder_norms: Tensor | None = None,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> StepOutput:
        """Write the gradients.  The loss is ``losses`` by ``weights``; ``to_decoder_norms [d_sae]`` is its part's.

        ``gradients`` are those of the architecture's own parameters, by name; they take the place of those made here.
        Those of the weights may be left to be made when all processes agree how: see :class:`StepKernel`.
        """
        self._given, self._to_norms = dict(gradients or {}), to_decoder_norms
        sae, found = self._sae, self.gradients
        if found.of_encoder and self._centers:
            self._b_dec -= sae.share.features.sum_(sae.W_enc.detach() @ found.b_enc)
        self._write({"b_enc": found.b_enc, "b_dec": self._b_dec, **self._given}, of_weights=False)
        if found.entries >= 0 and self._exchange is not None:
            self._exchange.left = self
        else:
            self.write_weights()
        terms = [weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]
        return StepOutput(
            loss=torch.stack(terms).sum(),
            losses=losses,
            output=self.output,
            fired=self.gradients.fired,
            coefficients=coefficients or {},
            metrics=metrics or {},
        )

    @property
    def entries(self) -> int:
        """Active entries of all rows, where the weights' gradients are still to be made."""
        return self.gradients.entries if self._seen == len(self.target) else -1

    def write_weights(self, rows: Group | None = None, counts: Sequence[int] = ()) -> frozenset[str]:
        """Write the gradients of the weights, of own rows; or of this process's part of the features, from all rows of
        the processes ``rows``, which have ``counts`` entries.  Names of parameters whose gradient is of all rows."""
        found, sae = self.gradients, self._sae
        mine = slice(None) if rows is None else found.make_own(rows, counts)
        made: dict[str, Tensor | None] = {"W_enc": None if found.W_enc is None else found.W_enc.T, "W_dec": found.W_dec}
        if found.W_dec is not None:
            W_dec, weights, factor = found.W_dec[mine], sae.W_dec.detach()[mine], sae.scaling_factor
            if factor is not None:
                to_factor = made["scaling_factor"] = torch.zeros_like(factor)
                to_factor[mine] = torch.linalg.vecdot(W_dec, weights)
                W_dec.mul_(factor.detach()[mine, None])
            if self._to_norms is not None:
                to_norms = self._to_norms if rows is None else rows.sum(self._to_norms)
                norms = sae.decoder_norms().detach()
                W_dec.addcmul_(weights, (to_norms / norms).where(norms > 0, 0)[mine, None])
        self._write(made | self._given, of_weights=True)
        return frozenset() if rows is None else frozenset(_LARGE - self._given.keys())

    def _write(self, gradients: Mapping[str, Tensor | None], *, of_weights: bool) -> None:
        """To the parameters that learn: to the weights, or to all others."""
        for name, parameter in self._sae.named_parameters():
            if (name in _OF_WEIGHTS) == of_weights:
                parameter.grad = gradients.get(name) if parameter.requires_grad else None
