"""The mathematics and the steps of ``gated``.

With ``x̄ W_enc`` of a row, the gate ``π = x̄ W_enc + b_gate`` and the magnitude ``m = x̄ W_enc e^r_mag + b_mag`` (arXiv
2404.16014, equations 5 to 7),

    f = H(π) max(m, 0),   loss = ‖x − f W_dec − b_dec‖² + λ Σ max(π, 0) ‖w‖ + ‖x − max(π, 0) W_dec − b_dec‖²,

where ``H`` has no derivative, and ``W_dec`` and ``b_dec`` of the last term may be held (equation 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from saekit import SAE, Ports, SAEConfig
from saekit.abilities import SparseActivation
from saekit.kernels import (
    CHUNK,
    Encoder,
    FastStep,
    Features,
    SparseFeatures,
    SparseKernel,
    Workspace,
    active_groups,
    add_product_,
    at_features,
    decoded_by_all,
    feature_sums,
    product,
    screen_for,
    values_of,
)
from saekit.protocols import ActivationFunction
from saekit.sae import Parameter, check_width, init, sparsity_penalty, squared_errors
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.gated import GatedConfig
from saekit_plugins.architectures.topk.module import check_relu

__all__ = ["GatedSAE"]

_ROWS = 512  # whose gates, magnitudes and gradients are made at once where many are open
_OWN = ("b_gate", "b_mag", "r_mag")


@attrs.define(eq=False)
class _Gates:
    """The gates of a step, group of rows by group: features, both of the gates' losses, and the gradients by all."""

    sae: GatedSAE
    fast: FastStep
    coefficient: float
    """λ."""
    gain: Tensor = attrs.field(init=False)
    """``e^r_mag [d_sae]``."""
    norms: Tensor | None = attrs.field(init=False)
    """``‖w‖``, where penalties are weighed by them."""
    l1: Tensor = attrs.field(init=False)
    """The sum of the rows' penalties so far."""
    errors: Tensor = attrs.field(init=False)
    """The sum of the squared errors of reconstructions by gates so far."""
    to_norms: Tensor | None = attrs.field(init=False, default=None)
    own: dict[str, Tensor] = attrs.field(init=False)
    """The gradients by the parameters that no other architecture has."""

    def __attrs_post_init__(self) -> None:
        sae = self.sae
        self.gain = sae.r_mag.detach().exp()
        weighs = sae.config.scale_sparsity_penalty_by_decoder_norm
        self.norms = sae.decoder_norms().detach() if weighs else None
        self.l1, self.errors = self.gain.new_zeros(()), self.gain.new_zeros(())
        self.own = {name: torch.zeros_like(self.gain) for name in _OWN}
        self.to_norms = None if self.norms is None else torch.zeros_like(self.norms)

    def add(self, start: int, pre: Features) -> None:
        """A group of rows that begins at row ``start``: ``x̄ W_enc`` of all features, or of those with open gates."""
        fast, n = self.fast, len(self.fast.target)
        bias, decoder = at_features(self.sae.b_gate.detach(), pre), fast.gradients.decoder
        gates = _with_values(pre, (values_of(pre) + bias).relu_())
        error = decoded_by_all(gates, decoder, self.sae.b_dec.detach(), self.sae.share)
        error -= fast.target[start : start + pre.shape[0]]
        self.errors += torch.linalg.vector_norm(error, dim=1).square().sum()
        error *= 2 / n
        self._penalize(gates)

        def to_pre(gradient: Tensor, features: Features, rows: slice) -> Tensor:
            part = slice(rows.start - start, rows.stop - start)
            if isinstance(gates, SparseFeatures):
                return self._to_pre(gradient, features, gates, pre, gates.inner_products(error, decoder))
            assert isinstance(pre, Tensor)
            return self._to_pre(gradient, features, gates[part], pre[part], product(error[part], decoder.T))

        fast.add(start, self.sae.magnitudes(pre, self.gain), to_pre)
        if self.sae.config.aux_loss_trains_decoder:
            self._train_decoder(gates, error)

    def _penalize(self, gates: Features) -> None:
        sums = feature_sums(gates, values_of(gates))
        self.l1 += sums.sum() if self.norms is None else torch.linalg.vecdot(sums, self.norms)
        if self.to_norms is not None:
            self.to_norms += sums * (self.coefficient / len(self.fast.target))

    def _to_pre(
        self, to_features: Tensor, features: Features, gates: Features, pre: Features, to_gate: Tensor
    ) -> Tensor:
        """From the gradients to features and to gates that to ``x̄ W_enc``; those by the own parameters are kept."""
        weight = self.coefficient / len(self.fast.target)
        to_gate += weight if self.norms is None else weight * at_features(self.norms, pre)
        to_gate *= values_of(gates) > 0
        to_magnitude = to_features.mul_(values_of(features) > 0)
        self.own["b_gate"] += feature_sums(pre, to_gate)
        self.own["b_mag"] += feature_sums(pre, to_magnitude)
        to_magnitude *= at_features(self.gain, pre)
        self.own["r_mag"] += feature_sums(pre, to_magnitude * values_of(pre))
        return to_gate.add_(to_magnitude)

    def _train_decoder(self, gates: Features, error: Tensor) -> None:
        found = self.fast.gradients
        self.fast.add_to_b_dec(error.sum(0))
        if found.W_dec is None:
            return
        if isinstance(gates, SparseFeatures):
            gates.add_outer_products(gates.values, error, found.W_dec)
        else:
            add_product_(found.W_dec, gates.T, error)


def _with_values(features: Features, values: Tensor) -> Features:
    return features.with_values(values) if isinstance(features, SparseFeatures) else values


def _rows(sae: GatedSAE) -> int:
    """Of a group whose gates are many; processes with other features, of which fewer may be open, work on the same."""
    return _ROWS if sae.share.parts == 1 else CHUNK


class GatedKernel(SparseKernel["GatedSAE"]):
    """Of open gates alone, where few are."""

    spreads_over = frozenset({"data", "features"})

    gradients = (*(name for name in SparseKernel.gradients if name != "b_enc"), *_OWN)

    def refuses_options(self, sae: GatedSAE, *, training: bool) -> str | None:
        if isinstance(sae.activation, SparseActivation):
            return None
        return "the activation function declares no sparse support"

    def beside(self, sae: GatedSAE, rows: int) -> int:
        # Where many gates are open: features, gates and the gradients to these.
        return 3 * min(rows, _rows(sae)) * sae.d_sae

    def encoder(self, sae: Any, workspace: Workspace) -> Encoder:
        zeros, split = torch.zeros_like(sae.b_gate), sae.share.parts > 1
        return Encoder(sae.W_enc.detach(), zeros, workspace, by_chunk=split, int8=sae.kernels == "int8")

    def _open(self, sae: GatedSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        """``x̄ W_enc``, group by group: of what exceeds ``−b_gate``, or of all features and few rows."""
        encoder = self.encoder(sae, workspace)
        closed = -sae.b_gate.detach()
        for start, pre in active_groups(encoder, rows, None, above=closed, screen=screen_for(encoder)):
            if isinstance(pre, SparseFeatures):
                yield start, pre
                continue
            n = _rows(sae)
            yield from zip(range(start, start + len(pre), n), pre.split(n), strict=True)

    def groups(self, sae: GatedSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        gain = sae.r_mag.detach().exp()
        for start, pre in self._open(sae, sae.centered(rows), workspace):
            features = sae.magnitudes(pre, gain)
            yield start, features.kept(features.values > 0) if isinstance(features, SparseFeatures) else features

    def step(self, sae: GatedSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        coefficient = sae.config.l1_at(step)
        fast = FastStep(sae, x, workspace, target=step.target)
        gates = _Gates(sae, fast, coefficient)
        for start, pre in self._open(sae, fast.centered, workspace):
            gates.add(start, pre)
        losses = {
            "mse_loss": fast.mse,
            "l1_loss": sae.share.features.sum(gates.l1 / len(x)),
            "auxiliary_reconstruction_loss": gates.errors / len(x),
        }
        return fast.finish(
            losses,
            weights=(1, coefficient, 1),
            coefficients={"l1_coefficient": coefficient},
            to_decoder_norms=gates.to_norms,
            gradients=gates.own,
        )


class GatedSAE(SAE):
    """See the module.  It has no ``b_enc``; what comes before its features is ``x̄ W_enc``.

    :class:`ConfigError` when the activation is not ReLU.
    """

    step_kernels = (GatedKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    saved_by_parts: ClassVar[Mapping[str, int]] = {}
    config: GatedConfig
    activation: Any
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def __init__(self, config: GatedConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        check_relu(activation, "gated is defined by magnitudes above zero themselves")
        super().__init__(config, ports=ports, activation=activation)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        shared = (entry for entry in super().parameters_of(config) if entry.name != "b_enc")
        grows = {"b_gate": 1, "b_mag": 1, "r_mag": 0}  # r_mag is the logarithm of a factor
        own = (Parameter(name, ("d_sae",), init=init.zeros, grows=grows[name], histogram=name) for name in _OWN)
        return (*own, *shared)

    def pre_activations(self, x: Tensor) -> Tensor:
        """``x̄ W_enc``, of which gates and magnitudes are made: ``[..., d_in]`` to ``[..., d_sae]``."""
        return self.centered(x) @ self.W_enc

    def features_of(self, pre: Tensor) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        return (pre * self.r_mag.exp() + self.b_mag).relu() * (pre + self.b_gate > 0)

    def magnitudes(self, pre: Features, gain: Tensor) -> Features:
        """:meth:`features_of` without autograd, with ``gain = e^r_mag [d_sae]``; entries of ``pre`` have open gates."""
        values = (values_of(pre) * at_features(gain, pre)).add_(at_features(self.b_mag.detach(), pre)).relu_()
        return pre.with_values(values) if isinstance(pre, SparseFeatures) else values.mul_(pre > -self.b_gate.detach())

    # ---- training

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        target, coefficient = step.target_for(x), self.config.l1_at(step)
        pre = self.pre_activations(x)
        features, gates = self.features_of(pre), (pre + self.b_gate).relu()
        output = self.reconstruction(features)
        mse = squared_errors(output, target).sum(-1).mean()
        weights = self.decoder_norms() if self.config.scale_sparsity_penalty_by_decoder_norm else None
        l1 = sparsity_penalty(gates, weights=weights, share=self.share)
        aux = squared_errors(self._by_gates(gates), target).sum(-1).mean()
        return StepOutput(
            loss=mse + coefficient * l1 + aux,
            losses={
                "mse_loss": mse.detach(),
                "l1_loss": l1.detach(),
                "auxiliary_reconstruction_loss": aux.detach(),
            },
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            coefficients={"l1_coefficient": coefficient},
        )

    def _by_gates(self, gates: Tensor) -> Tensor:
        """The reconstruction ``[n, d_out]`` by the gates' values ``[n, d_sae]``."""
        decoder, bias = self.scaled_decoder(), self.b_dec
        if not self.config.aux_loss_trains_decoder:
            decoder, bias = decoder.detach(), bias.detach()  # type: ignore[assignment]
        return self.share.sum(gates @ decoder) + bias

    # ---- saving

    def shift_pre_activations(self, shift: Tensor) -> None:
        """Gates and magnitudes have a bias each."""
        self.b_gate.add_(shift.to(self.b_gate))
        self.b_mag.add_((shift * self.r_mag.exp()).to(self.b_mag))

    def public_config(self) -> dict[str, Any]:
        return {"architecture": "gated"}
