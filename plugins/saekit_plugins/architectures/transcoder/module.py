"""The mathematics and the steps of transcoders: those of SAEs, of what a skip connection leaves over."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn

from saekit import SAE, SAEConfig
from saekit.kernels import SparseKernel, Workspace, product
from saekit.sae import Parameter, Start, init, not_compiled
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.groupmax.module import GroupMaxSAE
from saekit_plugins.architectures.jumprelu.module import JumpReLUKernel, JumpReLUSAE
from saekit_plugins.architectures.standard.module import StandardKernel, StandardSAE
from saekit_plugins.architectures.topk.module import TopKKernel, TopKSAE

__all__ = ["GroupMaxTranscoderSAE", "JumpReLUTranscoderSAE", "TopKTranscoderSAE", "TranscoderSAE"]


def _centered(start: Start, shape: tuple[int, ...]) -> Tensor:
    """``b_enc [d_sae]``: pre-activations are 0 on average, as if the inputs' mean were subtracted from them."""
    assert start.sample is not None
    inputs = init.initial_b_dec("mean", start.sample, start.sample.shape[1], start.dtype) * start.scale
    return -(inputs @ start["W_enc"].to(inputs.dtype))


class _Skips(SAE):
    """What a skip connection changes, where there is one."""

    config: Any
    W_skip: nn.Parameter
    """``[d_out, d_in]``."""

    @not_compiled
    def _towards(self, step: StepInput, target: Tensor) -> StepInput:
        """``step`` with another target.  A compiler does not follow attrs."""
        return attrs.evolve(step, target=target)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        there: Any = config
        skip = Parameter("W_skip", ("d_out", "d_in"), init=init.zeros, scale={"d_in": 1, "d_out": -1})
        starts: dict[str, Any] = {"W_dec": init.zeros} if there.decoder_zero_init else {}
        if there.b_enc_init_method == "centered":
            starts["b_enc"] = _centered
        found = [
            attrs.evolve(entry, init=starts.get(entry.name, entry.init)) for entry in super().parameters_of(config)
        ]
        return (*found, *([skip] if there.skip_connection else []))

    def bypass(self, x: Tensor) -> Tensor | None:
        return x @ self.W_skip.T if self.config.skip_connection else None

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        passed = self.bypass(x)
        if passed is None:
            return super().losses(x, step)
        target = step.target_for(x)
        result = self.losses_towards(x, self._towards(step, target - passed), target)
        return result._replace(output=result.output + passed.detach())

    def losses_towards(self, x: Tensor, left: StepInput, target: Tensor) -> StepOutput:
        """The losses of a step whose targets are what ``target [n, d_out]`` leaves over."""
        return super().losses(x, left)

    def loss_unit(self, target: Tensor) -> Tensor | None:
        """What the loss for ``target [n, d_out]`` is counted in, a scalar; None: nothing."""
        return None

    def named_elsewhere(self, kind: str) -> dict[str, Any]:
        """The entries of ``cfg.json`` by which sae-lens 6 knows transcoders, of one site to one other.

        ``kind`` begins the name: nothing, or ``jumprelu_``.
        """
        if len(self.ports.inputs) + len(self.ports.targets) > 2:
            return {"architecture": self.info.architecture}
        skip = "skip_" if self.config.skip_connection else ""
        return {"architecture": f"{kind}{skip}transcoder", "d_out": self.d_out}


class _SkippingKernel(SparseKernel[Any]):
    """Trains on what the skip connection leaves over, if there is one, and adds its gradient."""

    def step(self, sae: Any, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        passed = sae.bypass(x)
        if passed is None:
            return super().step(sae, x, step, workspace)
        target = step.target_for(x)
        left, unit = target - passed, sae.loss_unit(target)
        result = self.step_towards(sae, x, sae._towards(step, left), workspace, unit)
        if sae.W_skip.requires_grad:
            gradient = product((result.output - left).T, x) * (2 / len(x))
            sae.W_skip.grad = gradient if unit is None else gradient.div_(unit)
        return result._replace(output=result.output + passed)

    def step_towards(
        self, sae: Any, x: Tensor, left: StepInput, workspace: Workspace, unit: Tensor | None
    ) -> StepOutput:
        """A step whose targets are what is left over, with its loss counted in ``unit``."""
        return super().step(sae, x, left, workspace)


class TranscoderKernel(_SkippingKernel, StandardKernel):
    """That of ``standard``, and the skip connection's part."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    gradients = (*StandardKernel.gradients, "W_skip")


class JumpReLUTranscoderKernel(_SkippingKernel, JumpReLUKernel):
    """That of ``jumprelu``, and the skip connection's part."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    gradients = (*JumpReLUKernel.gradients, "W_skip")


class TopKTranscoderKernel(_SkippingKernel, TopKKernel):
    """That of ``topk``, and the skip connection's part."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    gradients = (*TopKKernel.gradients, "W_skip")

    def step_towards(
        self, sae: Any, x: Tensor, left: StepInput, workspace: Workspace, unit: Tensor | None
    ) -> StepOutput:
        return self.step_in(sae, x, left, workspace, unit)


class TranscoderSAE(_Skips, StandardSAE):
    """See the module."""

    step_kernels = (TranscoderKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})

    def public_config(self) -> dict[str, Any]:
        own = super().public_config()
        return self.named_elsewhere("") if own["architecture"] == "standard" else own


class JumpReLUTranscoderSAE(_Skips, JumpReLUSAE):
    """See the module."""

    step_kernels = (JumpReLUTranscoderKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    _name = "jumprelu_transcoder"

    def public_config(self) -> dict[str, Any]:
        return self.named_elsewhere("jumprelu_")


class _SkipsInUnits(_Skips, TopKSAE):
    """Those of ``topk`` and its relatives, whose losses may be counted in the variance of the whole targets."""

    def losses_towards(self, x: Tensor, left: StepInput, target: Tensor) -> StepOutput:
        return self.losses_in(x, left, self.loss_unit(target))

    def loss_unit(self, target: Tensor) -> Tensor | None:
        return TopKSAE.loss_unit(self, target)


class TopKTranscoderSAE(_SkipsInUnits):
    """See the module."""

    step_kernels = (TopKTranscoderKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    _name = "topk_transcoder"

    def public_config(self) -> dict[str, Any]:
        return {"architecture": self.info.architecture}


class GroupMaxTranscoderSAE(_SkipsInUnits, GroupMaxSAE):
    """See the module."""

    _name = "groupmax_transcoder"
    spreads_over = frozenset({"data", "features", "inference"})
