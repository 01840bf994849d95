"""A training step without autograd: reconstruction loss, its gradient, and what else the architecture adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saekit.distributed.share import Share
from saekit.kernels.features import Features
from saekit.kernels.gradients import FeatureGradient, Gradients, decoded_by_all
from saekit.kernels.outer import rows_are_less
from saekit.kernels.workspace import Workspace, uninitialized
from saekit.values import StepOutput

__all__ = ["FastStep", "Layer"]

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
        final: bool = False,
    ) -> None:
        """On ``x [n, d_in]`` towards ``target [n, d_out]``, or ``x`` itself.

        ``sae`` is a :class:`Layer`; ``row_weights [n, 1]`` multiply each row's squared error.  ``final`` says that
        nobody changes or reads the weights' gradients that :meth:`finish` writes before they are added up over the
        processes of a batch, so that each may have its part of the features alone, of all rows.
        """
        if not len(x):
            raise ValueError(f"there are no rows to train on: x is {list(x.shape)}")
        self._sae: Layer = sae
        self._weights, self._workspace = row_weights, workspace
        self._centers: bool = sae.config.apply_b_dec_to_input
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
        learns = {name for name, parameter in self._sae.named_parameters() if parameter.requires_grad}
        share, self._large = self._sae.share, {"W_enc", "W_dec"} & learns
        own = final and bool(self._large) and self._large <= share.parted
        self.gradients = Gradients(
            self._sae.W_enc.detach().T,
            self._sae.scaled_decoder().detach(),
            workspace,
            of_encoder=bool(learns - _OF_OUTPUTS) or ("b_dec" in learns and self._centers),
            of_decoder=bool(learns & {"W_dec", "scaling_factor"}),
            by_several=self._sae.share.parts > 1,  # whose groups are single chunks
            keeps=own and rows_are_less(share, len(self._sae.W_dec)),
        )
        self._b_dec = torch.zeros_like(self._sae.b_dec)

    def add(self, start: int, features: Features, to_pre: FeatureGradient) -> None:
        """A group of rows that begins at row ``start``.

        ``to_pre`` gives the gradient to the encoder's products from that to features.  It is not asked where nothing of
        the encoder learns.
        """
        rows = slice(start, start + features.shape[0])
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
        """
        own = self.gradients.make_own(self._sae.share.rows) if self.gradients.keeps else None
        found = {**self._found(to_decoder_norms, own), **(gradients or {})}
        for name, parameter in self._sae.named_parameters():
            parameter.grad = found.get(name) if parameter.requires_grad else None
        terms = [weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]
        return StepOutput(
            loss=torch.stack(terms).sum(),
            losses=losses,
            output=self.output,
            fired=self.gradients.fired,
            coefficients=coefficients or {},
            metrics=metrics or {},
            summed=frozenset() if own is None else frozenset(self._large - (gradients or {}).keys()),
        )

    def _found(self, to_decoder_norms: Tensor | None, own: slice | None) -> dict[str, Tensor | None]:
        """The gradients; those of the weights of ``own`` features alone, and of all rows of the batch, unless None."""
        sae, found = self._sae, self.gradients
        gradients: dict[str, Tensor | None] = {"W_enc": found.W_enc, "b_enc": found.b_enc, "b_dec": self._b_dec}
        if found.W_enc is not None:
            gradients["W_enc"] = found.W_enc.T
            if self._centers:
                self._b_dec -= sae.share.features.sum_(sae.W_enc.detach() @ found.b_enc)
        gradients["W_dec"] = found.W_dec
        if found.W_dec is None:
            return gradients
        mine = slice(None) if own is None else own
        W_dec, weights, factor = found.W_dec[mine], sae.W_dec.detach()[mine], sae.scaling_factor
        if factor is not None:
            to_factor = gradients["scaling_factor"] = torch.zeros_like(factor)
            to_factor[mine] = torch.linalg.vecdot(W_dec, weights)
            W_dec.mul_(factor.detach()[mine, None])
        if to_decoder_norms is not None:
            if own is not None:
                to_decoder_norms = sae.share.rows.sum(to_decoder_norms)
            norms = sae.decoder_norms().detach()
            W_dec.addcmul_(weights, (to_decoder_norms / norms).where(norms > 0, 0)[mine, None])
        return gradients
