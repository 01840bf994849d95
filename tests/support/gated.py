"""A gated SAE as a stranger would write it: parameters of its own, and a fast step made of public parts.

Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders": a feature is active where
``π = x̄ W_enc + b_gate`` is above zero, and is ``relu(x̄ W_enc ⊙ exp(r_mag) + b_mag)`` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from saekit import SAE, Entry, SAEConfig, StepInput, StepOutput, hookimpl
from saekit.kernels import (
    Encoder,
    FastStep,
    Features,
    SparseFeatures,
    SparseKernel,
    Workspace,
    active_groups,
    decoded,
    screen_for,
    values_of,
)
from saekit.sae import Parameter, init, squared_errors


@attrs.frozen(kw_only=True)
class GatedConfig(SAEConfig):
    sparsity: float = 0.5
    """The weight of the gate's L1 norm."""


class GatedKernel(SparseKernel["GatedSAE"]):
    gradients = ("W_enc", "W_dec", "b_dec", "scaling_factor", "b_gate", "b_mag", "r_mag")

    def encoder(self, sae: Any, workspace: Workspace) -> Encoder:
        return Encoder(sae.W_enc.detach(), sae.b_gate.detach(), workspace)

    def _gates(self, sae: Any, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        encoder = self.encoder(sae, workspace)
        return active_groups(encoder, rows, None, screen=screen_for(encoder))

    def groups(self, sae: GatedSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        for start, gate in self._gates(sae, sae.centered(rows), workspace):
            yield start, _features(sae, gate)

    def step(self, sae: GatedSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        fast, weight = FastStep(sae, x, workspace, target=step.target), sae.config.sparsity / len(x)
        W_dec, b_dec, gain = sae.W_dec.detach(), sae.b_dec.detach(), sae.r_mag.detach().exp()
        own = {name: torch.zeros_like(sae.b_gate) for name in ("b_gate", "b_mag", "r_mag")}
        l1, aux = x.new_zeros(()), x.new_zeros(())
        for start, gate in self._gates(sae, fast.centered, workspace):
            open_gate = gate if isinstance(gate, SparseFeatures) else gate.relu()
            error = decoded(open_gate, W_dec, b_dec) - fast.target[start : start + gate.shape[0]]
            l1 += values_of(open_gate).sum()
            aux += error.square().sum()
            error *= 2 / len(x)

            def to_pre(gradient: Tensor, f: Features, rows: slice) -> Tensor:
                part = slice(rows.start - start, rows.stop - start)  # noqa: B023 - called before the next group
                if isinstance(gate, SparseFeatures):  # noqa: B023
                    pi, columns, to_gate = gate.values, gate.features, gate.inner_products(error, W_dec)  # noqa: B023
                    bias, r, total = sae.b_gate[columns], gain[columns], gate.sums  # noqa: B023
                else:
                    pi, to_gate = gate[part], error[part] @ W_dec.T  # noqa: B023
                    bias, r, total = sae.b_gate, gain, lambda values: values.sum(0)
                to_gate = (to_gate + weight) * (pi > 0)
                to_mag = gradient * (values_of(f) > 0)
                own["b_gate"] += total(to_gate)
                own["b_mag"] += total(to_mag)
                own["r_mag"] += total(to_mag * (pi - bias) * r)
                return to_gate.add_(to_mag.mul_(r))

            fast.add(start, _features(sae, gate), to_pre)
        losses = {"mse_loss": fast.mse, "l1_loss": l1 / len(x), "gate_loss": aux / len(x)}
        return fast.finish(
            losses, weights=(1, sae.config.sparsity, 1), gradients=own, metrics={"details/open_gates": l1 / len(x)}
        )


def _features(sae: GatedSAE, gate: Features) -> Features:
    gain = sae.r_mag.detach().exp()
    if isinstance(gate, SparseFeatures):
        some = gate.features
        return gate.with_values(((gate.values - sae.b_gate[some]) * gain[some] + sae.b_mag[some]).relu())
    return ((gate - sae.b_gate) * gain + sae.b_mag).relu_() * (gate > 0)


class GatedSAE(SAE):
    config: GatedConfig
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    step_kernels = (GatedKernel(),)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        shared = (entry for entry in super().parameters_of(config) if entry.name != "b_enc")
        return (
            Parameter("b_gate", ("d_sae",), init=init.zeros, histogram="b_gate"),
            Parameter("b_mag", ("d_sae",), init=init.Constant(0.1)),
            Parameter("r_mag", ("d_sae",), init=init.zeros, keeps_digits=True, lr_factor=0.5, groups=("scale",)),
            *shared,
        )

    def pre_activations(self, x: Tensor) -> Tensor:
        return self.centered(x) @ self.W_enc

    def features_of(self, pre: Tensor) -> Tensor:
        return (pre * self.r_mag.exp().to(pre) + self.b_mag).relu() * (pre + self.b_gate > 0)

    def shift_pre_activations(self, shift: Tensor) -> None:
        self.b_gate += shift.to(self.b_gate)
        self.b_mag += (shift * self.r_mag.exp()).to(self.b_mag)

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        target, pre = step.target_for(x), self.pre_activations(x)
        features, gate = self.features_of(pre), (pre + self.b_gate).relu()
        output = self.reconstruction(features)
        mse = squared_errors(output, target).sum(-1).mean()
        l1 = gate.sum(-1).mean()
        aux = squared_errors(gate @ self.W_dec.detach() + self.b_dec.detach(), target).sum(-1).mean()
        return StepOutput(
            loss=mse + self.config.sparsity * l1 + aux,
            losses={"mse_loss": mse.detach(), "l1_loss": l1.detach(), "gate_loss": aux.detach()},
            output=output.detach(),
            fired=(features.detach() > 0).sum(0),
            metrics={"details/open_gates": l1.detach()},
        )


@hookimpl
def saekit_register_sae_architectures() -> Iterator[Entry]:
    yield Entry("gated", GatedConfig, "support.gated:GatedSAE", summary="features behind gates")
