"""The mathematics and the steps of transcoders: those of SAEs, of what a skip connection leaves over."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor, nn

from saekit import SAE, SAEConfig
from saekit.kernels import SparseKernel, Workspace
from saekit.sae import Parameter, init
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.groupmax.module import GroupMaxSAE
from saekit_plugins.architectures.jumprelu.module import JumpReLUKernel, JumpReLUSAE
from saekit_plugins.architectures.standard.module import StandardKernel, StandardSAE
from saekit_plugins.architectures.topk.module import TopKKernel, TopKSAE

__all__ = ["GroupMaxTranscoderSAE", "JumpReLUTranscoderSAE", "TopKTranscoderSAE", "TranscoderSAE"]


class _Skips(SAE):
    """What a skip connection changes, where there is one."""

    config: Any
    W_skip: nn.Parameter
    """``[d_out, d_in]``."""

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        there: Any = config
        skip = Parameter("W_skip", ("d_out", "d_in"), init=init.zeros, scale={"d_in": 1, "d_out": -1})
        return (*super().parameters_of(config), *([skip] if there.skip_connection else []))

    def bypass(self, x: Tensor) -> Tensor | None:
        return x @ self.W_skip.T if self.config.skip_connection else None

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        passed = self.bypass(x)
        if passed is None:
            return super().losses(x, step)
        result = super().losses(x, attrs.evolve(step, target=step.target_for(x) - passed))
        return result._replace(output=result.output + passed.detach())

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
        left = step.target_for(x) - passed
        result = super().step(sae, x, attrs.evolve(step, target=left), workspace)
        if sae.W_skip.requires_grad:
            sae.W_skip.grad = (result.output - left).T @ x * (2 / len(x))
        return result._replace(output=result.output + passed)


class TranscoderKernel(_SkippingKernel, StandardKernel):
    """That of ``standard``, and the skip connection's part."""

    gradients = (*StandardKernel.gradients, "W_skip")


class JumpReLUTranscoderKernel(_SkippingKernel, JumpReLUKernel):
    """That of ``jumprelu``, and the skip connection's part."""

    gradients = (*JumpReLUKernel.gradients, "W_skip")


class TopKTranscoderKernel(_SkippingKernel, TopKKernel):
    """That of ``topk``, and the skip connection's part."""

    gradients = (*TopKKernel.gradients, "W_skip")


class TranscoderSAE(_Skips, StandardSAE):
    """See the module."""

    step_kernels = (TranscoderKernel(),)

    def public_config(self) -> dict[str, Any]:
        own = super().public_config()
        return self.named_elsewhere("") if own["architecture"] == "standard" else own


class JumpReLUTranscoderSAE(_Skips, JumpReLUSAE):
    """See the module."""

    step_kernels = (JumpReLUTranscoderKernel(),)
    _name = "jumprelu_transcoder"

    def public_config(self) -> dict[str, Any]:
        return self.named_elsewhere("jumprelu_")


class TopKTranscoderSAE(_Skips, TopKSAE):
    """See the module."""

    step_kernels = (TopKTranscoderKernel(),)
    _name = "topk_transcoder"

    def public_config(self) -> dict[str, Any]:
        return {"architecture": self.info.architecture}


class GroupMaxTranscoderSAE(_Skips, GroupMaxSAE):
    """See the module."""

    _name = "groupmax_transcoder"
