"""The mathematics and the steps of ``standard``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from saekit.kernels import Encoder, FastStep, Features, SparseFeatures, SparsityPenalty, active_groups, screen_for
from saekit.protocols import SparseActivation
from saekit.sae import SAE, StepInput, StepOutput, ghost_loss, sparsity_penalty, spread, squared_errors
from saekit_plugins.architectures.standard import StandardConfig, l1_coefficient_at

__all__ = ["StandardSAE"]


class StandardSAE(SAE):
    """See the module."""

    config: StandardConfig

    def losses(self, x: torch.Tensor, step: StepInput) -> StepOutput:
        config = self.config
        noise, dead = self._drawn(x, step)
        pre = self.pre_activations(x)
        features = self.activation(pre if noise is None else pre + config.noise_scale * noise.to(pre))
        output = self.reconstruction(features)
        mse = squared_errors(output, x, config.mse_loss_normalization).sum(-1).mean()
        weights = self.W_dec.norm(dim=1) if config.scale_sparsity_penalty_by_decoder_norm else None
        penalty = sparsity_penalty(features, config.lp_norm, weights)
        coefficient = l1_coefficient_at(config, step.step)
        loss = mse + coefficient * penalty
        ghost = loss.new_zeros(())
        if dead is not None:
            ghost = ghost_loss(pre, x, output, self.W_dec, dead, config.mse_loss_normalization)
            loss = loss + ghost
        losses = {"mse_loss": mse, "l1_loss": penalty, "ghost_grad_loss": ghost}
        return StepOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l1_coefficient": coefficient},
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drawn(self, x: torch.Tensor, step: StepInput) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The noise ``[n, d_sae]`` and the numbers of the dead features, where they are used.

        Neither can be compiled; everything after them can, in one piece.
        """
        config, generator = self.config, step.generator
        noise = dead = None
        if config.noise_scale:
            noise = torch.randn(len(x), self.d_sae, generator=generator, device=generator.device)
        if config.use_ghost_grads and step.dead is not None:
            dead = step.dead.nonzero().squeeze(1)
        return noise, dead

    def why_no_fast_path(self, *, training: bool) -> str | None:
        if not isinstance(self.activation, SparseActivation):
            return "the activation function declares no sparse support"
        if training and self.config.lp_norm == float("inf"):
            return "an infinite lp_norm has no fast path"
        return "use_ghost_grads has no fast path" if training and self.config.use_ghost_grads else None

    def why_no_screen(self) -> str | None:
        return "there is noise" if self.config.noise_scale else super().why_no_screen()

    def feature_groups(self, rows: torch.Tensor) -> Iterator[tuple[int, Features]]:
        return self._groups(self.centered(rows))

    @property
    def _sparse(self) -> SparseActivation:
        """The activation, which is one where there is a fast path."""
        return cast("SparseActivation", self.activation)

    def _groups(self, centered: torch.Tensor, noise: Any = None) -> Iterator[tuple[int, Features]]:
        encoder = Encoder(self.W_enc.detach(), self.b_enc.detach())
        screen = screen_for(encoder) if noise is None else None
        return active_groups(encoder, centered, self._sparse, noise=noise, screen=screen)

    def fast_step(self, x: torch.Tensor, step: StepInput) -> StepOutput:
        config, coefficient, sparse = self.config, l1_coefficient_at(self.config, step.step), self._sparse
        fast = FastStep(self, x, None if config.mse_loss_normalization == "none" else 1 / spread(x))
        norms = self.decoder_norms() if config.scale_sparsity_penalty_by_decoder_norm else None
        penalty = SparsityPenalty.of(x, len(x), coefficient, config.lp_norm, norms, learns=self.W_dec.requires_grad)

        def to_pre(gradient: torch.Tensor, features: Features, rows: slice) -> torch.Tensor:
            values = features.values if isinstance(features, SparseFeatures) else features
            return sparse.pre_gradient(penalty.add_gradient(gradient, features), values)

        for start, features in self._groups(fast.centered, self._noise(step) if config.noise_scale else None):
            penalty.count(features)
            fast.add(start, features, to_pre)
        losses = {"mse_loss": fast.mse, "l1_loss": penalty.value, "ghost_grad_loss": x.new_zeros(())}
        return fast.finish(
            losses,
            weights=(1, coefficient, 1),
            coefficients={"l1_coefficient": coefficient},
            to_decoder_norms=penalty.to_norms,
        )

    def _noise(self, step: StepInput) -> Any:
        def draw(rows: int) -> torch.Tensor:
            generator = step.generator
            noise = torch.randn(rows, self.d_sae, generator=generator, device=generator.device)
            return noise.to(self.W_enc).mul_(self.config.noise_scale)

        return draw

    def public_config(self) -> dict[str, Any]:
        """sae-lens 6 knows the ReLU version only, and calls it ``standard``."""
        if self.info.options.get("activation") in ("saekit:relu", {"name": "saekit:relu"}):
            return {"architecture": "standard"}
        return super().public_config()
