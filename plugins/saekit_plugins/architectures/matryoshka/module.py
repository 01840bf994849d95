"""The mathematics and the steps of ``matryoshka``.

Level ``g`` reconstructs with the first ``m_g`` features, ``x̂_g = Σ_{i < m_g} f_i w_i + b_dec``; the features themselves
are those of ``batchtopk``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit import Ports
from saekit.kernels import Encoder, Features, NestedStep, Workspace, values_of
from saekit.protocols import ActivationFunction
from saekit.sae import squared_errors
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.batchtopk.module import BatchTopKKernel, BatchTopKSAE
from saekit_plugins.architectures.matryoshka import MatryoshkaConfig

__all__ = ["MatryoshkaSAE"]


class MatryoshkaKernel(BatchTopKKernel):
    """As :class:`BatchTopKKernel`, with a loss for each level."""

    spreads_over = frozenset({"data", "features"})

    def beside(self, sae: Any, rows: int) -> int:
        kept: int = sae.config.aux_loss_levels == "each"
        return (1 + kept) * len(sae.ends) * rows * int(sae.d_out)

    def step_in(self, sae: Any, x: Tensor, step: StepInput, workspace: Workspace, unit: Tensor | None) -> StepOutput:
        encoder, each = self.encoder(sae, workspace), sae.config.aux_loss_levels == "each"
        fast = NestedStep(
            sae, x, workspace, target=step.target, ends=sae.own_ends, weights=sae.factors,
            keep=each and step.dead is not None, row_weights=None if unit is None else (1 / unit).expand(len(x), 1),
        )  # fmt: skip

        def to_pre(gradient: Tensor, features: Features, rows: slice) -> Tensor:
            found: Tensor = sae.activation.pre_gradient(gradient, values_of(features))
            return found

        norms, wanted = sae.feature_norms(), sae.wanted_at(step, sae.share.n(len(x)))
        ((start, features),) = self.chosen(sae, encoder, fast.centered, norms, wanted)
        logged = sae.logged_k(step) | sae.after_features(features.scaled(norms))
        fast.add(start, features, to_pre)
        aux = x.new_zeros(())
        if step.dead is not None and sae.revives(step):
            aux = self._add_aux_loss(sae, fast, encoder, step.dead, unit)
        *inner, mse = fast.level_errors
        losses = {"mse_loss": mse, "inner_mse_loss": sae.inner(inner), "auxiliary_reconstruction_loss": aux}
        return fast.finish(losses, weights=(sae.factors[-1], 1, 1), coefficients=logged, metrics=sae.by_width(inner))

    def _add_aux_loss(self, sae: Any, fast: NestedStep, encoder: Encoder, dead: Tensor, unit: Tensor | None) -> Tensor:
        if not fast.outputs:
            aux: Tensor = sae.add_aux_loss(fast, encoder, dead, unit)
            return aux
        found = fast.target.new_zeros(())
        for (begin, end), output in zip(pairwise((0, *sae.own_ends)), fast.outputs, strict=True):
            found = found + sae.add_aux_loss(fast, encoder, dead, unit, output, slice(begin, end))
        return found


class MatryoshkaSAE(BatchTopKSAE):
    """See the module.  :class:`ConfigError` also for levels that do not rise, or weights of another number."""

    step_kernels = (MatryoshkaKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    config: MatryoshkaConfig
    _name: ClassVar[str] = "matryoshka"

    def __init__(self, config: MatryoshkaConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        d_sae = config.features(ports.d_in)
        self.ends = config.level_ends(d_sae)
        """The features that each level has, the last all."""
        self.factors = config.level_factors(d_sae)
        """What each level's mean squared error is multiplied by."""
        super().__init__(config, ports=ports, activation=activation)

    @property
    def own_ends(self) -> tuple[int, ...]:
        """:attr:`ends` among the features that this process has: all of them, unless they are split."""
        first = self.share.first_feature(self.d_sae)
        return tuple(min(max(end - first, 0), self.d_sae) for end in self.ends)

    def public_config(self) -> dict[str, Any]:
        """Levels are of training alone: what is trained is the same function of inputs as with BatchTopK."""
        return super().public_config()

    # ---- training

    def losses_in(self, x: Tensor, step: StepInput, unit: Tensor | None) -> StepOutput:
        wanted, logged = (
            self.wanted_at(step, self.share.n(len(x))),
            self.logged_k(step),
        )  # before what a compiler follows
        target, pre = step.target_for(x), self.pre_activations(x)
        features = self.training_features(pre, wanted)
        outputs = self.level_outputs(features)
        errors = (squared_errors(output, target).sum(-1).mean() for output in outputs)
        *inner, mse = errors if unit is None else (error / unit for error in errors)
        among = self.inner(inner)
        aux = self._aux_loss(pre, target, outputs, step.dead)
        aux = aux if unit is None else aux / unit
        return StepOutput(
            loss=self.factors[-1] * mse + among + aux,
            losses={
                "mse_loss": mse.detach(),
                "inner_mse_loss": among.detach(),
                "auxiliary_reconstruction_loss": aux.detach(),
            },
            output=outputs[-1].detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients=logged | self.after_features(features.detach()),
            metrics=self.by_width(inner),
        )

    def level_outputs(self, features: Tensor) -> list[Tensor]:
        """The reconstructions ``[..., d_out]`` of ``features [..., d_sae]``, level by level; the last is the SAE's."""
        scale, outputs = self.decoder_scale(), [self.b_dec.expand(*features.shape[:-1], -1)]
        scaled = features if scale is None else features * scale
        for begin, end in pairwise((0, *self.own_ends)):
            outputs.append(outputs[-1] + self.share.sum(scaled[..., begin:end] @ self.W_dec[begin:end]))
        return outputs[1:]

    def inner(self, errors: Sequence[Tensor]) -> Tensor:
        """What the mean squared errors of all levels but the last are in the loss: a scalar."""
        weighted = [factor * error for factor, error in zip(self.factors, errors, strict=False)]
        return torch.stack(weighted).sum() if weighted else self.W_dec.new_zeros(())

    def by_width(self, errors: Sequence[Tensor]) -> dict[str, float | Tensor]:
        """They by the names under which they are logged."""
        return {f"details/mse_of_first_{end}": error.detach() for end, error in zip(self.ends, errors, strict=False)}

    def _aux_loss(self, pre: Tensor, target: Tensor, outputs: Sequence[Tensor], dead: Tensor | None) -> Tensor:
        if dead is None or self.config.aux_loss_levels == "whole":
            return self.aux_loss(pre, target, outputs[-1], dead)
        features, found = torch.arange(self.d_sae, device=dead.device), pre.new_zeros(())
        for (begin, end), output in zip(pairwise((0, *self.own_ends)), outputs, strict=True):
            here = dead & (features >= begin) & (features < end)
            found = found + self.aux_loss(pre, target, output, here)
        return found

    # ---- saving

    def trained_as(self) -> dict[str, Any]:
        details = {"k": self.config.k, "matryoshka_widths": list(self.ends)}
        return {"training_architecture": "matryoshka_batchtopk", "training_architecture_details": details}
