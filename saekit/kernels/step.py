"""A training step without autograd: reconstruction loss, its gradient, and what else the architecture adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.kernels.encoder import Features
from saekit.kernels.gradients import FeatureGradient, Gradients, decoded
from saekit.kernels.workspace import scratch, uninitialized
from saekit.values import StepOutput

if TYPE_CHECKING:
    from saekit.sae.module import SAEModule

__all__ = ["FastStep"]


class FastStep:
    """Reconstructs a batch group by group, and leaves the loss's gradient in the parameters' ``grad``.

    ::

        fast = FastStep(sae, x)
        for start, features in groups:
            fast.add(start, features, to_pre)
        return fast.finish(losses=...)
    """

    def __init__(self, sae: SAEModule, x: Tensor, row_weights: Tensor | None = None) -> None:
        """On ``x [n, d_in]``; ``row_weights [n, 1]`` multiply each row's squared error."""
        if not len(x):
            raise ValueError("there are no rows to train on: x is [0, d_in]")
        self._sae, self._x, self._weights = sae, x, row_weights
        self.centered = x
        """``[n, d_in]``: the encoder's input."""
        if sae.config.apply_b_dec_to_input:
            self.centered = torch.sub(x, sae.b_dec.detach(), out=scratch("centered", x.shape, x.dtype, x.device))
        self.b_enc = sae.b_enc.detach()
        self.output: Tensor
        """``[n, d_in]``: reconstructions, as far as they are made."""
        self.squares = x.new_zeros(len(x))
        """``[n]``: each row's squared error, weighted."""
        learns = {name: parameter.requires_grad for name, parameter in sae.named_parameters()}
        self.gradients = Gradients(
            sae.W_enc.detach().T,
            _decoder(sae),
            of_encoder=learns["W_enc"] or learns["b_enc"] or (learns["b_dec"] and sae.config.apply_b_dec_to_input),
            of_decoder=learns["W_dec"] or learns.get("scaling_factor", False),
        )
        self._b_dec = torch.zeros_like(sae.b_dec)

    def add(self, start: int, features: Features, to_pre: FeatureGradient) -> None:
        """A group of rows that begins at row ``start``."""
        rows = slice(start, start + features.shape[0])
        x = self._x[rows]
        output = decoded(features, self.gradients.decoder, self._sae.b_dec.detach())
        if len(x) == len(self._x):
            self.output = output
        else:
            if start == 0:
                self.output = uninitialized(tuple(self._x.shape), x.dtype, x.device)
            self.output[rows] = output
        error = torch.sub(output, x, out=scratch("error", x.shape, x.dtype, x.device))
        squares = torch.linalg.vector_norm(error, dim=1, keepdim=True).square_()
        if self._weights is not None:
            squares *= self._weights[rows]
            error *= self._weights[rows]
        self.squares[rows] = squares[:, 0]
        gradient = error.mul_(2 / len(self._x))
        self._b_dec += gradient.sum(0)
        self.gradients.add(features, self.centered[rows], gradient, to_pre, rows)

    @property
    def mse(self) -> Tensor:
        """``mean_b Σ_d (x̂ − x)²`` with the rows' weights: a scalar."""
        return self.squares.mean()

    def finish(
        self,
        losses: Mapping[str, Tensor],
        *,
        weights: Iterable[float],
        coefficients: Mapping[str, float | Tensor] | None = None,
        to_decoder_norms: Tensor | None = None,
    ) -> StepOutput:
        """Write the gradients.  The loss is ``losses`` by ``weights``; ``to_decoder_norms [d_sae]`` is its part's."""
        sae, found = self._sae, self.gradients
        gradients: dict[str, Tensor | None] = {"W_enc": found.W_enc, "b_enc": found.b_enc, "b_dec": self._b_dec}
        if found.W_enc is not None:
            gradients["W_enc"] = found.W_enc.T
            if sae.config.apply_b_dec_to_input:
                self._b_dec -= sae.W_enc.detach() @ found.b_enc
        W_dec, factor = found.W_dec, sae.scaling_factor
        if factor is not None and W_dec is not None:
            gradients["scaling_factor"] = torch.linalg.vecdot(W_dec, sae.W_dec.detach())
            W_dec.mul_(factor.detach()[:, None])
        if to_decoder_norms is not None and W_dec is not None:
            norms = sae.decoder_norms().detach()
            W_dec.addcmul_(sae.W_dec.detach(), (to_decoder_norms / norms).where(norms > 0, 0)[:, None])
        gradients["W_dec"] = W_dec
        for name, parameter in sae.named_parameters():
            parameter.grad = gradients.get(name) if parameter.requires_grad else None
        terms = [weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]
        return StepOutput(
            loss=torch.stack(terms).sum(),
            losses=losses,
            output=self.output,
            fired=found.fired,
            coefficients=coefficients or {},
        )


def _decoder(sae: SAEModule) -> Tensor:
    decoder, factor = sae.W_dec.detach(), sae.scaling_factor
    return decoder if factor is None else decoder * factor.detach()[:, None]
