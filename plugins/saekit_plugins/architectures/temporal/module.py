"""The mathematics of ``temporal``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from saekit import SAE, Ports, SAEConfig
from saekit.errors import ConfigError
from saekit.protocols import ActivationFunction
from saekit.sae import Factor, Parameter, check_scales, check_width, init, one_factor
from saekit_plugins.architectures.for_inference import WHY
from saekit_plugins.architectures.temporal import TemporalConfig

__all__ = ["TemporalSAE"]

_NO_PRE = "temporal has no pre-activations: its features are of what attention leaves over"
_EPS = 1e-6
_PARTS = ("k_ctx", "q_target", "v_ctx", "c_proj")  # keys, queries, values, and what is made of the heads' results


class TemporalSAE(SAE):
    """``ŷ = ((f + p) W_dec + b_dec) / s``, where ``p`` is what was to be expected and ``f`` what is new.

    Inputs are ``s x − b_dec``, and ``a(r) = relu(λ r W_enc)`` with ``λ = 1 / (4 d_in)``.  Each layer looks with
    ``a(r)`` of a position at those of the positions before it, and its prediction ``ẑ``, scaled to where ``ẑ W_dec`` is
    nearest to ``r``, goes into ``p`` and out of ``r``, which is ``s x − b_dec`` at first.  ``f`` is ``a(r)`` of what is
    left.  :meth:`encode` gives ``f``, and :meth:`decode` decodes that alone: the prediction passes it by
    (:meth:`bypass`).

    Takes ``[batch, position, d_in]``.  ``b_dec`` is added where it is taken from inputs, or the encoder is another
    matrix than the decoder's transpose.
    """

    config: TemporalConfig
    scaling_factor = None
    reads_sequences = True
    why_no_training = WHY
    hook_points = ("input", "acts_post", "recons", "error", "output")

    def __init__(self, config: TemporalConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        if not ports.same:
            raise ConfigError("temporal predicts what it reads: it has no other targets")
        d_sae, parts = config.features(ports.d_in), config.bottleneck_factor * config.n_heads
        if d_sae % parts:
            raise ConfigError([("sae.d_sae", f"is {d_sae}, which bottleneck_factor · n_heads = {parts} must divide")])
        super().__init__(config, ports=ports, activation=activation)

    @classmethod
    def parameters_of(cls, config: SAEConfig) -> tuple[Parameter, ...]:
        there: Any = config
        found = [
            Parameter("W_dec", ("d_sae", "d_out"), init=init.decoder, histogram="W_dec_norms"),
            Parameter("b_dec", ("d_out",), init=init.b_dec),
        ]
        if not there.tied_weights:
            found.append(Parameter("W_enc", ("d_in", "d_sae"), init=init.encoder, turn=0))
        for layer in range(there.n_attn_layers):
            for part in _PARTS:
                short = part in ("k_ctx", "q_target")
                size = "d_sae" if not short or config.d_sae is None else config.d_sae // there.bottleneck_factor
                for kind, dims in (("weight", (size, "d_sae")), ("bias", (size,))):
                    found.append(Parameter(_own_name(layer, part, kind), dims, init=init.zeros, split=None))
        return tuple(found)

    # ---- inference

    def features_from(self, x: Tensor) -> Tensor:
        """What is new ``[b, t, d_sae]`` in ``x [b, t, d_in]``."""
        return self._new(self.predicted(x)[1])

    def features_and_bypass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prediction, left = self.predicted(x)
        return self._new(left), self._passed(prediction)

    def _new(self, left: Tensor) -> Tensor:
        """The features of what a prediction leaves over."""
        self.refuse_hooks("acts_pre", _NO_PRE)
        new = self._activations(left)
        k = self.config.kval_topk
        if self.config.sae_diff_type == "relu" or k is None:
            return new
        values, features = new.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(new).scatter(-1, features, values)

    def predicted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``p [b, t, d_sae]`` of ``x [b, t, d_in]``, and what it leaves over of ``s x − b_dec``, ``[b, t, d_in]``."""
        residual = self.centered(x)
        prediction = residual.new_zeros(*residual.shape[:-1], self.d_sae)
        for layer in range(self.config.n_attn_layers):
            now = self._activations(residual)
            before = torch.cat([torch.zeros_like(now[:, :1]), now[:, :-1]], dim=1)
            found = self._attended(layer, now, before).relu()
            decoded = found @ self.W_dec
            length = decoded.norm(dim=-1, keepdim=True) + _EPS
            factor = (decoded * residual).sum(-1, keepdim=True) / length.square()
            prediction = prediction + factor * found
            residual = residual - factor * decoded
        return prediction, residual

    def _activations(self, residual: Tensor) -> Tensor:
        encoder = self.W_dec.T if self.config.tied_weights else self.W_enc
        return ((residual * (1 / (4 * self.d_in))) @ encoder).relu()

    def _attended(self, layer: int, now: Tensor, before: Tensor) -> Tensor:
        """Of a layer, ``[b, t, d_sae]``: queries from ``now``, keys and values from ``before``, no later ones."""
        keys, queries, values = (
            linear(given, *self._of(layer, part)).unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)
            for part, given in (("k_ctx", before), ("q_target", now), ("v_ctx", before))
        )
        heads = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return linear(heads.transpose(1, 2).flatten(-2), *self._of(layer, "c_proj"))

    def _of(self, layer: int, part: str) -> tuple[Tensor, Tensor]:
        weight, bias = (getattr(self, _own_name(layer, part, kind)) for kind in ("weight", "bias"))
        return weight, bias

    def centered(self, x: Tensor) -> Tensor:
        check_width(x, self.d_in, "d_in", "inputs")
        scaled = x * self.config.input_scale
        return scaled - self.b_dec if self.config.apply_b_dec_to_input else scaled

    def pre_activations(self, x: Tensor) -> NoReturn:
        raise ConfigError(f"{_NO_PRE}; encode(x) gives features")

    def features_of(self, pre: Tensor) -> NoReturn:
        self.pre_activations(pre)

    def reconstruction(self, features: Tensor) -> Tensor:
        """Of what is new alone."""
        check_width(features, self.d_sae, "d_sae", "features")
        output = features @ self.W_dec
        # An encoder that is the decoder's transpose sees the bias, or there is none.
        biased = self.config.apply_b_dec_to_input or not self.config.tied_weights
        return (output + self.b_dec if biased else output) / self.config.input_scale

    def bypass(self, x: Tensor) -> Tensor:
        """What was predicted, decoded: ``[b, t, d_in]``."""
        return self._passed(self.predicted(x)[0])

    def _passed(self, prediction: Tensor) -> Tensor:
        return prediction @ self.W_dec / self.config.input_scale

    # ---- saving

    @torch.no_grad()
    def fold_activation_scale(self, scale: Factor, target_scale: Factor | None = None) -> None:
        """The scale becomes part of ``input_scale``, and no weight changes."""
        check_scales(scale, target_scale, self.ports)
        one = float(one_factor(scale, "temporal has one input_scale"))
        if target_scale is not None and float(one_factor(target_scale)) != one:
            raise ConfigError("temporal gives back what it reads, so scale and target_scale cannot differ")
        super().fold_activation_scale(one)
        whole = self.config.input_scale * one
        self.config = attrs.evolve(self.config, input_scale=whole)
        self.info = attrs.evolve(self.info, options={**self.info.options, "input_scale": whole})

    def public_config(self) -> dict[str, Any]:
        names = ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights")
        return {
            "architecture": "temporal",
            **{name: getattr(self.config, name) for name in names},
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": self.config.input_scale,
        }

    def public_tensors(self) -> dict[str, Tensor]:
        """By the names that sae-lens has for those of attention."""
        theirs = {ours: public for public, ours in self._names()}
        return {theirs.get(name, name): value for name, value in super().public_tensors().items()}

    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        ours = dict(self._names())
        super().load_public_tensors({ours.get(name, name): value for name, value in tensors.items()})

    def _names(self) -> Iterator[tuple[str, str]]:
        """The public names of the tensors of attention, and those of the table."""
        for layer in range(self.config.n_attn_layers):
            for part in _PARTS:
                for kind in ("weight", "bias"):
                    yield f"attn_layers.{layer}.{part}.{kind}", _own_name(layer, part, kind)


def _own_name(layer: int, part: str, kind: str) -> str:
    """A parameter's name cannot have points."""
    return f"attention_{layer}_{part}_{kind}"
