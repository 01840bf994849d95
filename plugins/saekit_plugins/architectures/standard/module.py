"""The mathematics and the steps of ``standard``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saekit import SAE
from saekit.abilities import SparseActivation
from saekit.kernels import (
    CHUNK,
    FastStep,
    Features,
    SparseKernel,
    SparsityPenalty,
    Workspace,
    active_groups,
    screen_for,
    values_of,
)
from saekit.sae import ghost_loss, not_compiled, sparsity_penalty, spread, squared_errors
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.standard import StandardConfig

__all__ = ["StandardSAE"]


class StandardKernel(SparseKernel["StandardSAE"]):
    """Products of the active features alone, where few are."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    def refuses_options(self, sae: StandardSAE, *, training: bool) -> str | None:
        if not isinstance(sae.activation, SparseActivation):
            return "the activation function declares no sparse support"
        if training and sae.config.lp_norm == float("inf"):
            return "an infinite lp_norm has no fast path"
        return "use_ghost_grads has no fast path" if training and sae.config.use_ghost_grads else None

    def why_no_screen(self, sae: StandardSAE) -> str | None:
        return "there is noise" if sae.config.noise_scale else super().why_no_screen(sae)

    def groups(self, sae: StandardSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        return self._groups(sae, sae.centered(rows), workspace)

    def _groups(
        self, sae: StandardSAE, centered: Tensor, workspace: Workspace, noise: Any = None
    ) -> Iterator[tuple[int, Features]]:
        encoder = self.encoder(sae, workspace)
        screen = screen_for(encoder) if noise is None else None
        return active_groups(encoder, centered, sae.activation, noise=noise, screen=screen)

    def step(self, sae: StandardSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        config, coefficient = sae.config, sae.config.l1_at(step)
        target = step.target_for(x)
        weights = None if config.mse_loss_normalization == "none" else 1 / spread(target, sae.share)
        fast = FastStep(sae, x, workspace, target=target, row_weights=weights)
        norms = sae.decoder_norms() if config.scale_sparsity_penalty_by_decoder_norm else None
        learns = sae.W_dec.requires_grad
        penalty = SparsityPenalty.of(x, len(x), coefficient, config.lp_norm, norms, learns=learns, share=sae.share)

        def to_pre(gradient: Tensor, features: Features, rows: slice) -> Tensor:
            gradient = penalty.add_gradient(gradient, features, rows)
            found: Tensor = sae.activation.pre_gradient(gradient, values_of(features))
            return found

        noise = self._noise(sae, step, len(x)) if config.noise_scale else None
        for start, features in self._groups(sae, fast.centered, workspace, noise):
            penalty.count(features, start)
            fast.add(start, features, to_pre)
        losses = {
            "mse_loss": fast.mse,
            "l1_loss": penalty.value,
            "ghost_grad_loss": x.new_zeros(()),
        }
        return fast.finish(
            losses,
            weights=(1, coefficient, 1),
            coefficients={"l1_coefficient": coefficient},
            to_decoder_norms=penalty.to_norms,
        )

    def _noise(self, sae: StandardSAE, step: StepInput, n: int) -> Any:
        if sae.share.split:  # drawn for all rows and features
            parts = iter(sae.share.noise(n, sae.d_sae, step.generator).split(CHUNK))
            return lambda rows: next(parts).to(sae.W_enc).mul(sae.config.noise_scale)

        def draw(rows: int) -> Tensor:
            generator = step.generator
            noise = torch.randn(rows, sae.d_sae, generator=generator, device=generator.device)
            return noise.to(sae.W_enc).mul_(sae.config.noise_scale)

        return draw


class StandardSAE(SAE):
    """See the module."""

    step_kernels = (StandardKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    config: StandardConfig
    activation: Any

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        config = self.config
        noise, dead = self._drawn(x, step)
        pre = self.pre_activations(x)
        features = self.activation(pre if noise is None else pre + config.noise_scale * noise.to(pre))
        output = self.reconstruction(features)
        target = step.target_for(x)
        mse = squared_errors(output, target, config.mse_loss_normalization, self.share).sum(-1).mean()
        weights = self.W_dec.norm(dim=1) if config.scale_sparsity_penalty_by_decoder_norm else None
        penalty = sparsity_penalty(features, config.lp_norm, weights, self.share)
        coefficient = config.l1_at(step)
        loss = mse + coefficient * penalty
        ghost = loss.new_zeros(())
        if dead is not None:
            ghost = ghost_loss(pre, target, output, self.W_dec, dead, config.mse_loss_normalization, self.share)
            loss = loss + ghost
        losses = {"mse_loss": mse, "l1_loss": penalty, "ghost_grad_loss": ghost}
        return StepOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l1_coefficient": coefficient},
        )

    @not_compiled
    def _drawn(self, x: Tensor, step: StepInput) -> tuple[Tensor | None, Tensor | None]:
        """The noise ``[n, d_sae]`` and the numbers of the dead features, where they are used.

        Neither can be compiled; everything after them can, in one piece.
        """
        config, generator = self.config, step.generator
        noise = dead = None
        if config.noise_scale:
            noise = self.share.noise(len(x), self.d_sae, generator)
        if config.use_ghost_grads and step.dead is not None:
            dead = step.dead.nonzero().squeeze(1)
        return noise, dead

    def public_config(self) -> dict[str, Any]:
        """sae-lens 6 knows the ReLU version only, and calls it ``standard``."""
        if self.info.options.get("activation") in ("saekit:relu", {"name": "saekit:relu"}):
            return {"architecture": "standard"}
        return super().public_config()
