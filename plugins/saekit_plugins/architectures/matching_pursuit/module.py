"""The mathematics of ``matching_pursuit``."""

from __future__ import annotations

from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from saekit import SAE, Ports, SAEConfig
from saekit.errors import ConfigError
from saekit.protocols import ActivationFunction
from saekit.sae import Factor, Parameter, check_scales, check_width, init, one_factor
from saekit_plugins.architectures.for_inference import WHY
from saekit_plugins.architectures.matching_pursuit import MatchingPursuitConfig

__all__ = ["MatchingPursuitSAE"]

_NO_PRE = "matching_pursuit has no pre-activations: it takes features one after the other"


class MatchingPursuitSAE(SAE):
    """From the residual ``r = x̄`` take, again and again, the feature ``i`` with the largest ``relu(r · w_i)``.

    ``f_i`` grows by ``a = relu(r · w_i)``, and ``r`` becomes ``r − a w_i``.  Which one is taken has no gradient, what
    it gets has.  ``b_dec`` is added to reconstructions where it is taken from inputs, and nowhere else.

    There are no pre-activations of which features were a function: each depends on those that were taken before it.
    """

    config: MatchingPursuitConfig
    scaling_factor = None
    why_no_training = WHY
    hook_points = ("input", "acts_post", "recons", "error", "output")

    def __init__(self, config: MatchingPursuitConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        if not ports.same:
            raise ConfigError(
                "matching_pursuit encodes by its decoder, so it gives back what it reads: no other targets"
            )
        super().__init__(config, ports=ports, activation=activation)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        """Rows of ``W_dec`` are directions alike of what is read and of what is given, so no scale goes into them."""
        return (
            Parameter("W_dec", ("d_sae", "d_out"), init=init.decoder, histogram="W_dec_norms"),
            Parameter("b_dec", ("d_out",), init=init.b_dec, scale={"d_out": -1}),
        )

    # ---- inference

    def features_from(self, x: Tensor) -> Tensor:
        self.refuse_hooks("acts_pre", _NO_PRE)
        rows = self.centered(x)
        return self._pursued(rows.reshape(-1, self.d_in)).reshape(*rows.shape[:-1], self.d_sae)

    def pre_activations(self, x: Tensor) -> NoReturn:
        raise ConfigError(f"{_NO_PRE}; encode(x) gives features")

    def features_of(self, pre: Tensor) -> NoReturn:
        self.pre_activations(pre)

    def _pursued(self, rows: Tensor) -> Tensor:
        """Features ``[n, d_sae]`` of ``rows [n, d_in]``, without the bias.  Rows that are done take no more work."""
        active = torch.zeros(len(rows), self.d_sae, dtype=torch.bool, device=rows.device)
        at, residual = torch.arange(len(rows), device=rows.device), rows
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.config.max_iterations or self.d_in):
            if not len(at):
                break
            with torch.no_grad():
                taken = (residual @ self.W_dec.T).relu().argmax(dim=-1)
            directions = self.W_dec[taken]
            values = (residual * directions).sum(-1).relu()
            residual = residual - values[:, None] * directions
            found.append((at, taken, values))
            new = ~active[at, taken] & (values.detach() != 0)
            active[at, taken] |= new
            goes_on = self._goes_on(new, residual.detach())
            at, residual = at[goes_on], residual[goes_on]
        if not found:
            return rows.new_zeros(len(rows), self.d_sae)
        entries, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values.new_zeros(len(rows), self.d_sae).index_put((entries, columns), values, accumulate=True)

    def _goes_on(self, new: Tensor, residual: Tensor) -> Tensor:
        """``[n]`` bool: the rows that are not done; ``new`` says which of them have one more active feature."""
        goes_on = new if self.config.stop_on_duplicate_support else torch.ones_like(new)
        if self.config.residual_threshold > 0:
            goes_on = goes_on & ~(residual.norm(dim=-1) < self.config.residual_threshold)
        return goes_on

    def reconstruction(self, features: Tensor) -> Tensor:
        check_width(features, self.d_sae, "d_sae", "features")
        output = features @ self.W_dec
        return output + self.b_dec if self.config.apply_b_dec_to_input else output

    # ---- saving

    @torch.no_grad()
    def fold_activation_scale(self, scale: Factor, target_scale: Factor | None = None) -> None:
        """Directions stay as they are, and features come in units of ``x`` itself, ``1 / scale`` of what they were."""
        check_scales(scale, target_scale, self.ports)
        one = float(one_factor(scale, "matching_pursuit encodes by its decoder"))
        if target_scale is not None and float(one_factor(target_scale)) != one:
            raise ConfigError("matching_pursuit encodes by its decoder, so scale and target_scale cannot differ")
        super().fold_activation_scale(one)
        threshold = self.config.residual_threshold / one
        self.config = attrs.evolve(self.config, residual_threshold=threshold)
        self.info = attrs.evolve(self.info, options={**self.info.options, "residual_threshold": threshold})

    def public_config(self) -> dict[str, Any]:
        names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        return {"architecture": "matching_pursuit", **{name: getattr(self.config, name) for name in names}}
