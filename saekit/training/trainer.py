"""One SAE in training: everything about it that changes from step to step."""

from __future__ import annotations

import copy

import attrs
import torch
from torch import Tensor

from saekit.errors import DivergedError
from saekit.sae.module import SAE, StepInput
from saekit.site import Site
from saekit.training.firing import FiringStatistics
from saekit.training.metrics import step_metrics, window_metrics
from saekit.training.optimiser import Optimiser

__all__ = ["SAETrainer"]


@attrs.define
class SAETrainer:
    """An SAE with its optimiser, firing statistics and random numbers.  It knows nothing of where batches come from."""

    sae: SAE
    site: Site
    optimiser: Optimiser
    firing: FiringStatistics
    generator: torch.Generator
    device: str
    log_frequency: int
    scale: float = 1.0
    """Activations are multiplied by this before the SAE sees them."""
    step: int = 0
    tokens: int = 0

    def train_on(self, rows: Tensor, *, last: bool = False) -> dict[str, float]:
        """One step on ``rows [n, d_in]``.  Metrics when it is time to log or the ``last`` step, else nothing."""
        x = rows.to(self.device, self.sae.W_enc.dtype, non_blocking=True)
        if self.scale != 1:
            x = x * self.scale
        dead = self.firing.dead()
        result = self.sae.training_step(x, StepInput(step=self.step, generator=self.generator, dead=dead))
        self.sae.before_update()
        grad_norm = self.optimiser.step(self.step)
        self.sae.after_update()
        window_ended = self.firing.update(result.fired, len(x))
        self.step += 1
        self.tokens += len(x)

        metrics: dict[str, float] = {}
        if self.step % self.log_frequency == 0 or self.step == 1 or last:
            metrics = step_metrics(
                x,
                result,
                since_fired=self.firing.since_fired,
                dead=self.firing.dead(),
                lr=self.optimiser.lr,
                grad_norm=grad_norm,
                tokens=self.tokens,
            )
            self._check_finite(metrics, x)
        if window_ended and self.firing.last_fractions is not None:
            metrics |= window_metrics(self.firing.last_fractions)
        return metrics

    def _check_finite(self, metrics: dict[str, float], x: Tensor) -> None:
        loss = metrics["losses/overall_loss"]
        if loss - loss != 0:  # inf and nan
            raise DivergedError(
                f"the loss of {self.site.name} is {loss} at step {self.step} (learning rate {self.optimiser.lr:g}, "
                f"activations of mean norm {x.norm(dim=-1).mean().item():.4g}, gradient norm "
                f"{metrics['details/grad_norm']:.4g}). Lower training.lr, or add training.lr_warm_up_steps"
            )

    def raw_sae(self) -> SAE:
        """The SAE for raw activations, with its firing fractions: to measure and to save.

        It is a copy with the scale folded in, or the SAE itself where there is none.
        """
        sae = self.sae
        if self.scale != 1:
            sae = copy.deepcopy(sae)
            sae.fold_activation_scale(self.scale)
        sae.info = attrs.evolve(sae.info, metadata={**sae.info.metadata, "training_tokens": self.tokens})
        sae.log_sparsity = self.firing.log_sparsity().cpu()
        return sae
