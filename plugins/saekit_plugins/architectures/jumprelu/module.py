"""The mathematics and the steps of ``jumprelu``.

With the pre-activation ``z``, the threshold ``θ ≥ 0`` and the bandwidth ``b``, ``f = z H(z − θ)``, whose derivatives
are taken for (arXiv 2407.14435, equations 11 and 12)

    ∂f/∂z = H(z − θ),   ∂f/∂θ = −(θ/b) K((z − θ)/b),   ∂H/∂θ = −(1/b) K((z − θ)/b),

with ``K`` 1 between −½ and ½, else 0.  What ``ste_to_input`` adds to the derivatives by ``z`` is minus those by ``θ``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from saekit import ConfigError, Ports, SAEConfig
from saekit.abilities import SparseActivation
from saekit.devices import at_hand
from saekit.kernels import (
    Encoder,
    FastStep,
    Features,
    SparseFeatures,
    SparseKernel,
    Workspace,
    active_groups,
    add_product_,
    at_features,
    at_rows,
    feature_sums,
    product,
    row_sums,
    screen_for,
    values_of,
)
from saekit.protocols import ActivationFunction
from saekit.sae import Parameter, check_width, init, squared_errors
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.revival import RevivingSAE
from saekit_plugins.architectures.topk.module import check_relu, from_zero

__all__ = ["JumpReLUKernel", "JumpReLUSAE"]

_ROWS = 1024  # of dead features' pre-activations that are made at once


@attrs.define(eq=False)
class _Jumps:
    """The jumps of a step, group of rows by group: features, the sparsity loss, the gradients by ``z`` and ``θ``."""

    sae: JumpReLUSAE
    n: int
    """Rows in the batch."""
    coefficient: float
    """λ."""
    workspace: Workspace
    threshold: Tensor = attrs.field(init=False)
    norms: Tensor | None = attrs.field(init=False)
    """``‖w‖``, where the sparsity loss needs it."""
    total: Tensor = attrs.field(init=False)
    """The sum of the rows' sparsity losses so far."""
    to_threshold: Tensor = attrs.field(init=False)
    to_norms: Tensor | None = attrs.field(init=False, default=None)
    _pre: Tensor = attrs.field(init=False)
    """Pre-activations of the group: of all features, or of the entries."""
    _start: int = attrs.field(init=False, default=0)
    _l0: Tensor = attrs.field(init=False)
    """``[rows]``: the active features of each row of the group; of all processes, where their number matters."""

    def __attrs_post_init__(self) -> None:
        config, self.threshold = self.sae.config, self.sae.threshold.detach()
        tanh, pre_act = config.sparsity_loss == "tanh", bool(config.pre_act_loss_coefficient)
        self.norms = self.sae.decoder_norms().detach() if tanh or pre_act else None
        self.total = self.threshold.new_zeros(())
        self.to_threshold = torch.zeros_like(self.threshold)
        self.to_norms = None if self.norms is None else torch.zeros_like(self.norms)

    @property
    def above(self) -> Tensor:
        """``[d_sae]``: what lies below is neither active nor near enough to its threshold to say anything of it."""
        return self.threshold - self.sae.config.bandwidth / 2

    def features(self, start: int, pre: Features) -> Features:
        """The features of a group that begins at row ``start``; entries near their thresholds are among them, as 0."""
        self._start = start
        if isinstance(pre, SparseFeatures):
            self._pre = pre.values
            found: Features = pre.with_values(pre.values * (pre.values > self.threshold[pre.features]))
        else:
            self._pre = pre
            out = self.workspace.scratch("features", tuple(pre.shape), pre.dtype, pre.device)
            found = torch.mul(pre, torch.gt(pre, self.threshold, out=self.workspace.mask_like(pre)), out=out)
        self._count(found)
        return found

    def _count(self, features: Features) -> None:
        config = self.sae.config
        if config.sparsity_loss != "tanh":
            active = self._pre > at_features(self.threshold, features)
            l0, target = row_sums(features, active.to(values_of(features).dtype)), config.target_l0
            if target is None:
                self.total += l0.sum()
            else:
                self._l0 = self.sae.share.features.sum_(l0)
                self.total += (self._l0 - target).square().sum() * (2 / target)
            return
        assert self.norms is not None
        assert self.to_norms is not None
        for part in [features] if isinstance(features, SparseFeatures) else features.split(_ROWS // 2):
            values = values_of(part)
            bent = (config.tanh_scale * values * at_features(self.norms, part)).tanh_()
            self.total += bent.sum()
            slope = (1 - bent.square_()).mul_(values).mul_(config.tanh_scale * self.coefficient / self.n)
            self.to_norms += feature_sums(part, slope)

    def to_pre(self, gradient: Tensor, features: Features, rows: slice) -> Tensor:
        """From the gradient to features to that to pre-activations; that to thresholds is kept."""
        config, values, pre = self.sae.config, values_of(features), self._pre
        if not isinstance(features, SparseFeatures):
            pre = pre[rows.start - self._start : rows.stop - self._start]
        threshold = at_features(self.threshold, features)
        active = pre > threshold
        near = ((pre - threshold).abs() < config.bandwidth / 2).to(pre.dtype).div_(config.bandwidth)
        if config.sparsity_loss == "tanh":
            assert self.norms is not None
            norms = config.tanh_scale * at_features(self.norms, features)
            gradient += (1 - (norms * values).tanh().square()) * norms * (self.coefficient / self.n)
            jump = near.mul_(threshold * gradient)
        else:
            jump = near.mul_(threshold * gradient + self._slope(features, rows))
        self.to_threshold -= feature_sums(features, jump)
        to_pre = gradient.mul_(active)
        return to_pre.add_(jump) if config.ste_to_input else to_pre

    @property
    def loss(self) -> Tensor:
        """The mean of the rows' sparsity losses; of all features, for which each process asks once."""
        own = self.total / self.n
        return own if self.sae.config.sparsity_loss == "target_l0" else self.sae.share.features.sum(own)

    def _slope(self, features: Features, rows: slice) -> Tensor | float:
        """The derivative of the loss by ``H`` of each entry, where it is a loss of their number."""
        target, slope = self.sae.config.target_l0, self.coefficient / self.n
        if target is None:
            return slope
        l0 = self._l0[rows.start - self._start : rows.stop - self._start]
        return at_rows((l0 - target).mul_(4 / target * slope), features)

    def add_pre_act_loss(self, fast: FastStep, encoder: Encoder, dead: Tensor) -> Tensor:
        """The pre-activation loss of the features that are ``dead [d_sae]``; its gradients are added to ``fast``'s."""
        weight, found = self.sae.config.pre_act_loss_coefficient / self.n, fast.gradients
        if not at_hand(dead.device):
            return self._add_masked_pre_act_loss(fast, encoder, dead)
        dead = dead.nonzero().squeeze(1)
        if not len(dead):
            return self.total.new_zeros(())
        assert self.norms is not None
        assert self.to_norms is not None
        part = Encoder(encoder.W_enc[:, dead], encoder.b_enc[dead], encoder.workspace)
        norms, total = self.norms[dead], self.total.new_zeros(())
        for rows in fast.centered.split(_ROWS):
            missing = (self.threshold[dead] - part.pre_activations(rows)).relu_()
            sums, below = missing.sum(0), (missing > 0).to(rows.dtype)
            total += sums @ norms
            self.to_norms[dead] += weight * sums
            if found.of_encoder:
                pull = below.mul_(weight * norms)
                self.to_threshold[dead] += pull.sum(0)
                found.b_enc[dead] -= pull.sum(0)
                assert found.W_enc is not None
                found.W_enc.index_add_(0, dead, product(pull.T, rows), alpha=-1)
        return total / self.n

    def _add_masked_pre_act_loss(self, fast: FastStep, encoder: Encoder, dead: Tensor) -> Tensor:
        """The same by products of all features, without waiting for the device to know which are dead."""
        weight, found = self.sae.config.pre_act_loss_coefficient / self.n, fast.gradients
        assert self.norms is not None
        assert self.to_norms is not None
        alive, total = ~dead, self.total.new_zeros(())
        for rows in fast.centered.split(_ROWS):
            missing = (self.threshold - encoder.pre_activations(rows)).relu_().masked_fill_(alive, 0)
            sums, below = missing.sum(0), (missing > 0).to(rows.dtype)
            total += sums @ self.norms
            self.to_norms += weight * sums
            if found.of_encoder:
                pull = below.mul_(weight * self.norms)
                self.to_threshold += pull.sum(0)
                found.b_enc -= pull.sum(0)
                assert found.W_enc is not None
                add_product_(found.W_enc, pull.neg_().T, rows)
        return total / self.n


class JumpReLUKernel(SparseKernel["JumpReLUSAE"]):
    """Of active features, and those near their thresholds, alone."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    gradients = (*SparseKernel.gradients, "threshold")

    def refuses_options(self, sae: JumpReLUSAE, *, training: bool) -> str | None:
        if isinstance(sae.activation, SparseActivation):
            return None
        return "the activation function declares no sparse support"

    def groups(self, sae: JumpReLUSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        encoder = self.encoder(sae, workspace)
        above = sae.threshold.detach().clamp_min(0)
        return active_groups(encoder, sae.centered(rows), sae.activation, above=above, screen=screen_for(encoder))

    def leaves(self, sae: JumpReLUSAE, x: Tensor, step: StepInput) -> bool:
        return sae.waits(step)

    def step(self, sae: JumpReLUSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        config, coefficient = sae.config, sae.config.l0_at(step)
        fast = FastStep(sae, x, workspace, target=step.target)
        encoder = self.encoder(sae, workspace)
        jumps = _Jumps(sae, len(x), coefficient, workspace)
        groups = active_groups(encoder, fast.centered, None, above=jumps.above, screen=screen_for(encoder))
        for start, pre in groups:
            fast.add(start, jumps.features(start, pre), jumps.to_pre)
        pre_act = aux = x.new_zeros(())
        if step.dead is not None and sae.revives(step):
            if config.pre_act_loss_coefficient:
                pre_act = jumps.add_pre_act_loss(fast, encoder, step.dead)
            aux = sae.add_aux_loss(fast, encoder, step.dead)
        return fast.finish(
            {
                "mse_loss": fast.mse,
                "sparsity_loss": jumps.loss,
                "pre_act_loss": sae.share.features.sum(pre_act),
                "auxiliary_reconstruction_loss": aux,
            },
            weights=(1, coefficient, config.pre_act_loss_coefficient, 1),
            coefficients={"l0_coefficient": coefficient},
            to_decoder_norms=jumps.to_norms,
            gradients={"threshold": jumps.to_threshold},
        )


class JumpReLUSAE(RevivingSAE):
    """See the module.  :class:`ConfigError` when the activation is not ReLU."""

    step_kernels = (JumpReLUKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    saved_by_parts: ClassVar[Mapping[str, int]] = {}
    config: JumpReLUConfig
    activation: Any
    _name: ClassVar[str] = "jumprelu"
    threshold: nn.Parameter
    """``[d_sae]``: the numbers themselves, 0 or more, in float32 at least."""

    def __init__(self, config: JumpReLUConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        check_relu(activation, f"{self._name} is defined by the pre-activations above thresholds themselves")
        features = config.features(ports.d_in)
        if config.target_l0 is not None and config.target_l0 > features:
            raise ConfigError([("sae.target_l0", f"is {config.target_l0:g}, but there are only {features} features")])
        super().__init__(config, ports=ports, activation=activation)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        options: Any = config
        start = init.Constant(options.initial_threshold)
        own = Parameter("threshold", ("d_sae",), init=start, grows=1, keeps_digits=True, histogram="threshold")
        return (*super().parameters_of(config), own)

    def features_of(self, pre: Tensor) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        return pre.relu() * (pre > self.threshold)

    # ---- training

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        config, target = self.config, step.target_for(x)
        pre = self.pre_activations(x)
        features, gate = self._jump(pre)
        output = self.reconstruction(features)
        coefficient = config.l0_at(step)
        losses = {
            "mse_loss": squared_errors(output, target).sum(-1).mean(),
            "sparsity_loss": self._sparsity(features, gate),
            "pre_act_loss": self._pre_act_loss(pre, step.dead),
            "auxiliary_reconstruction_loss": self.aux_loss(pre, target, output, step.dead),
        }
        weights = (1, coefficient, config.pre_act_loss_coefficient, 1)
        loss = torch.stack([weight * value for weight, value in zip(weights, losses.values(), strict=True)]).sum()
        return StepOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l0_coefficient": coefficient},
        )

    def _jump(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """``f`` and ``H(z − θ)``, ``[n, d_sae]`` both, with the estimated slopes of the jump."""
        config, threshold = self.config, self.threshold
        moves = (pre if config.ste_to_input else pre.detach()) - threshold
        slope = (moves.detach().abs() < config.bandwidth / 2).to(moves.dtype) / config.bandwidth
        gate = (pre > threshold).to(pre.dtype)
        estimate = slope * (moves - moves.detach())  # a zero that has a gradient
        return pre * gate + threshold.detach() * estimate, gate + estimate

    def _sparsity(self, features: Tensor, gate: Tensor) -> Tensor:
        config = self.config
        if config.sparsity_loss == "tanh":
            return self.share.sum((config.tanh_scale * features * self.decoder_norms()).tanh().sum(-1)).mean()
        l0 = self.share.sum(gate.sum(-1))
        if config.target_l0 is None:
            return l0.mean()
        return (2 / config.target_l0 * (l0 - config.target_l0).square()).mean()

    def _pre_act_loss(self, pre: Tensor, dead: Tensor | None) -> Tensor:
        if dead is None or not self.config.pre_act_loss_coefficient:
            return pre.new_zeros(())
        return self.share.sum(((self.threshold - pre).relu() * dead * self.decoder_norms()).sum(-1)).mean()

    def revives(self, step: StepInput) -> bool:
        return super().revives(step) or (step.dead is not None and bool(self.config.pre_act_loss_coefficient))

    @torch.no_grad()
    def after_update(self) -> None:
        super().after_update()
        self.threshold.clamp_(min=0)  # below, negative pre-activations would be features

    # ---- saving

    def public_config(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}

    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = dict(tensors)
        if "threshold" in tensors:
            tensors["threshold"] = from_zero(tensors["threshold"])
        super().load_public_tensors(tensors)
