"""The mathematics and the steps of crosscoders.  Sites lie side by side in the columns of their matrices.

With ``x_s`` of the sites that are read and ``y_t`` of those that are written,

    z = Σ_s x_s W_enc^s + b_enc,   f = act(z),   ŷ_t = f W_dec^t + b_dec^t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit import SAE
from saekit.abilities import SparseActivation
from saekit.kernels import (
    FastStep,
    Features,
    SparseKernel,
    SparsityPenalty,
    Workspace,
    active_groups,
    screen_for,
    values_of,
)
from saekit.sae import sparsity_penalty, squared_errors
from saekit.values import Scale, StepInput, StepOutput
from saekit_plugins.architectures.batchtopk.module import BatchTopKKernel, BatchTopKSAE
from saekit_plugins.architectures.crosscoder import BatchTopKCrosscoderConfig, CrosscoderConfig

__all__ = ["BatchTopKCrosscoderSAE", "CrosscoderSAE"]


class _SeveralSites(SAE):
    """What there is to ask of features that several sites share."""

    def decoder_norms_by_site(self, scale: Scale = 1.0) -> dict[str, Tensor]:
        """The norms ``[d_sae]`` of the decoder rows, by the name of each site that is written.

        They are in the units of that site's activations.  ``scale``, one number or one for each site, multiplies them:
        ``sae.info.metadata["activation_scale"]`` of a saved SAE gives the units in which it was trained, where sites
        can be compared.
        """
        factor = scale if isinstance(scale, Mapping) else dict.fromkeys(self.ports.targets, scale)
        return {name: part.norm(dim=1) * factor[name] for name, part in self._parts(self.W_dec).items()}

    def shares(self) -> dict[str, float | Tensor]:
        """For each site its part of the sum of a feature's decoder norms, as a mean over the features that have any."""
        norms = {name: norm.detach() for name, norm in self.decoder_norms_by_site().items()}
        total = torch.stack([*norms.values()]).sum(0)
        return {f"crosscoder/share_of_{name}": self._mean_of_all(norm / total) for name, norm in norms.items()}

    def _mean_of_all(self, values: Tensor) -> Tensor:
        """Over all features, but for those whose ``values [d_sae]`` are no numbers."""
        return self.share.all_features(values).nanmean()

    def _parts(self, matrix: Tensor) -> dict[str, Tensor]:
        return self.ports.split_target(matrix)

    def summed_norms(self, W_dec: Tensor) -> Tensor:
        """``Σ_t ‖W_dec^t row‖``: ``[d_sae]``, of a ``W_dec [d_sae, d_out]``."""
        return torch.stack([part.norm(dim=1) for part in self._parts(W_dec).values()]).sum(0)


class CrosscoderKernel(SparseKernel["CrosscoderSAE"]):
    """Products of the active features alone, where few are."""

    spreads_over = frozenset({"data", "features"})

    def refuses_options(self, sae: CrosscoderSAE, *, training: bool) -> str | None:
        if isinstance(sae.activation, SparseActivation):
            return None
        return "the activation function declares no sparse support"

    def groups(self, sae: CrosscoderSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        encoder = self.encoder(sae, workspace)
        return active_groups(encoder, sae.centered(rows), sae.activation, screen=screen_for(encoder))

    def step(self, sae: CrosscoderSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        coefficient, summed = sae.config.l1_at(step), sae.config.decoder_norm == "l1"
        fast = FastStep(sae, x, workspace, target=step.target)
        weights = sae.penalty_weights()
        penalty = SparsityPenalty.of(
            x, len(x), coefficient, 1.0, weights, learns=sae.W_dec.requires_grad, share=sae.share
        )

        def to_pre(gradient: Tensor, features: Features, rows: slice) -> Tensor:
            found: Tensor = sae.activation.pre_gradient(penalty.add_gradient(gradient, features), values_of(features))
            return found

        for start, features in self.groups(sae, x, workspace):
            penalty.count(features)
            fast.add(start, features, to_pre)
        result = fast.finish(
            {"mse_loss": fast.mse, "l1_loss": penalty.value},
            weights=(1, coefficient),
            coefficients={"l1_coefficient": coefficient},
            metrics=sae.shares(),
            to_decoder_norms=None if summed else penalty.to_norms,
        )
        if summed and penalty.to_norms is not None:
            sae.add_norm_gradients(penalty.to_norms)
        return result


class CrosscoderSAE(_SeveralSites):
    """See the module."""

    step_kernels = (CrosscoderKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    config: CrosscoderConfig
    activation: Any

    def penalty_weights(self) -> Tensor:
        """``[d_sae]``: what features are multiplied by in the penalty."""
        return self.summed_norms(self.W_dec) if self.config.decoder_norm == "l1" else self.decoder_norms()

    def add_norm_gradients(self, to_norms: Tensor) -> None:
        """Add to the gradient of ``W_dec`` what ``to_norms [d_sae]``, that to the sum of norms, is to it."""
        if self.W_dec.grad is None:
            return
        gradients, parts = self._parts(self.W_dec.grad), self._parts(self.W_dec)
        for name, part in parts.items():
            norms = part.norm(dim=1)
            gradients[name].addcmul_(part, (to_norms / norms).where(norms > 0, 0)[:, None])

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        features = self.activation(self.pre_activations(x))
        output = self.reconstruction(features)
        mse = squared_errors(output, step.target_for(x)).sum(-1).mean()
        penalty, coefficient = (
            sparsity_penalty(features, weights=self.penalty_weights(), share=self.share),
            self.config.l1_at(step),
        )
        return StepOutput(
            loss=mse + coefficient * penalty,
            losses={"mse_loss": mse.detach(), "l1_loss": penalty.detach()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l1_coefficient": coefficient},
            metrics=self.shares(),
        )


class BatchTopKCrosscoderKernel(BatchTopKKernel):
    """That of ``batchtopk``, by other norms."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        return super().step(sae, x, step, workspace)._replace(metrics=sae.shares())


class BatchTopKCrosscoderSAE(_SeveralSites, BatchTopKSAE):
    """See the module."""

    step_kernels = (BatchTopKCrosscoderKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    config: BatchTopKCrosscoderConfig
    _name: ClassVar[str] = "batchtopk_crosscoder"

    def norms_of(self, W_dec: Tensor) -> Tensor:
        return self.summed_norms(W_dec)

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        return super().losses(x, step)._replace(metrics=self.shares())

    def public_config(self) -> dict[str, Any]:
        return {"architecture": self.info.architecture}
