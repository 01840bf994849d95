"""The mathematics and the steps of ``topk``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor

from saekit import Ports
from saekit.abilities import SparseActivation
from saekit.cautions import warn
from saekit.distributed import WHOLE, Share
from saekit.errors import ConfigError
from saekit.kernels import (
    Encoder,
    FastStep,
    Features,
    SparseFeatures,
    SparseKernel,
    StepKernel,
    Workspace,
    dense_above,
    screen_for,
    top_groups,
    values_of,
)
from saekit.protocols import ActivationFunction
from saekit.sae import Factor, check_maps, check_scales, check_width, copied, not_compiled, squared_errors
from saekit.transforms import Affine
from saekit.values import StepInput, StepOutput
from saekit_plugins.architectures.coefficients import k_at
from saekit_plugins.architectures.revival import RevivingSAE
from saekit_plugins.architectures.topk import TopKConfig

__all__ = ["TopKSAE", "folded"]

FOLDED = ("W_enc", "b_enc", "W_dec")


def check_relu(activation: ActivationFunction, why: str) -> None:
    """:class:`ConfigError` unless ``activation`` is ReLU; ``why`` it must be, in words."""
    numbers = torch.cat([torch.linspace(-3, 3, 601), torch.tensor([-1e6, -40.0, 6.5, 25.0, 1e6])])
    if not torch.equal(activation(numbers.clone()), numbers.clamp_min(0)):
        raise ConfigError([("sae.activation", f"is not ReLU, and {why}; leave it out")])


def from_zero(thresholds: Tensor) -> Tensor:
    """``thresholds`` of a file as they are used: a feature is above zero, so those below 0 do what 0 does."""
    if bool((below := thresholds < 0).any()):
        warn(
            f"{int(below.sum()):,} of {below.numel():,} thresholds in the file are below 0, the least "
            f"{thresholds.min().item():.4g}. They are read as 0: pre-activations below 0 are never features here. If "
            "they were where it was trained, this is another SAE",
        )
    return thresholds.clamp_min(0)


def share_of_variance(target: Tensor, output: Tensor, share: Share = WHOLE) -> Tensor:
    """What turns a mean squared error of explaining ``target − output``, ``[n, d_out]`` both, into a share of its
    variance: a scalar, detached; 0 if nothing is left over."""
    residual = (target - output).detach()
    variance = share.mean((residual - share.row_mean(residual)).pow(2).sum(-1))
    return variance.reciprocal().nan_to_num(posinf=0)


def folded(tensors: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
    """``tensors`` with the decoder's ``norms [d_sae]``, by which features are multiplied, in the encoder."""
    W_enc, b_enc, W_dec = (tensors[name] for name in FOLDED)
    return {**tensors, "W_enc": W_enc * norms, "b_enc": b_enc * norms, "W_dec": W_dec / norms[:, None]}


class TopKKernel(SparseKernel["TopKSAE"]):
    """Of the active features alone, in every product but the encoder's."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True
    sparse: ClassVar[type[SparseFeatures]] = SparseFeatures
    """What makes the products of active features, those of AuxK too."""

    def refuses_options(self, sae: TopKSAE, *, training: bool) -> str | None:
        if sae.config.k > dense_above(sae.W_dec) * sae.d_sae:
            return f"k = {sae.config.k} is so large a part of the features that sparse products cost more"
        if isinstance(sae.activation, SparseActivation):
            return None
        return "the activation function declares no sparse support"

    def leaves(self, sae: TopKSAE, x: Tensor, step: StepInput) -> bool:
        # While k is large, sparse products cost more.
        return sae.waits(step) or sae.k_at(step) > dense_above(sae.W_dec) * sae.d_sae

    def step(self, sae: TopKSAE, x: Tensor, step: StepInput, workspace: Workspace) -> StepOutput:
        return self.step_in(sae, x, step, workspace, sae.loss_unit(step.target_for(x)))

    def step_in(
        self, sae: TopKSAE, x: Tensor, step: StepInput, workspace: Workspace, unit: Tensor | None
    ) -> StepOutput:
        """A step whose loss is counted in ``unit``, a scalar."""
        norms, encoder = sae.feature_norms(), self.encoder(sae, workspace)
        weights = None if unit is None else (1 / unit).expand(len(x), 1)
        fast = FastStep(sae, x, workspace, target=step.target, row_weights=weights, sparse=self.sparse)
        logged, wanted = sae.logged_k(step), sae.wanted_at(step, sae.share.n(len(x)))

        def to_pre(gradient: Tensor, features: Features, rows: slice) -> Tensor:
            found: Tensor = sae.activation.pre_gradient(gradient, values_of(features))
            return found

        for start, features in self.chosen(sae, encoder, fast.centered, norms, wanted):
            logged |= sae.after_features(features.scaled(norms))
            fast.add(start, features, to_pre)
        aux = x.new_zeros(())
        if step.dead is not None and sae.revives(step):
            aux = sae.add_aux_loss(fast, encoder, step.dead, unit)
        losses = {"mse_loss": fast.mse, "auxiliary_reconstruction_loss": aux}
        return fast.finish(losses, weights=(1, 1), coefficients=logged)

    def chosen(
        self, sae: Any, encoder: Encoder, centered: Tensor, norms: Tensor | None, wanted: int
    ) -> Iterator[tuple[int, SparseFeatures]]:
        """The pre-activations of active features in training, group by group with its first row; ``wanted`` is what
        :meth:`TopKSAE.wanted_at` says."""
        screen = screen_for(encoder, norms)
        return top_groups(encoder, centered, wanted, scale=norms, screen=screen, share=sae.share)

    def groups(self, sae: TopKSAE, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        norms = sae.feature_norms()
        for start, group in self.chosen(sae, self.encoder(sae, workspace), sae.centered(rows), norms, sae.config.k):
            yield start, group.scaled(norms)


class TopKSAE(RevivingSAE):
    """With ``rescale_acts_by_decoder_norm``, features are pre-activations times ``‖W_dec row‖``.

    :class:`ConfigError` when the activation is not ReLU, or ``k`` is more than there are features.
    """

    step_kernels: ClassVar[Sequence[StepKernel[Any]]] = (TopKKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    competes_over: ClassVar[str | None] = "features"
    saved_by_parts: ClassVar[Mapping[str, int]] = {}
    config: TopKConfig
    _name: ClassVar[str] = "topk"

    def __init__(self, config: TopKConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        check_relu(activation, f"{self._name} is defined by the largest pre-activations themselves")
        config.check_features(config.features(ports.d_in))
        super().__init__(config, ports=ports, activation=activation)

    activation: Any

    def feature_norms(self) -> Tensor | None:
        """``[d_sae]``: what pre-activations are multiplied by, and features divided by before they are decoded."""
        if not self.config.rescale_acts_by_decoder_norm:
            return None
        return self.norms_of(self.W_dec).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    def norms_of(self, W_dec: Tensor) -> Tensor:
        """``[d_sae]``: the norms by which features are compared, of a ``W_dec [d_sae, d_out]``."""
        return W_dec.norm(dim=1)  # type: ignore[no-any-return]

    def decoder_scale(self) -> Tensor | None:
        norms, factor = self.feature_norms(), self.scaling_factor
        if norms is None:
            return factor
        return 1 / norms if factor is None else factor / norms

    def features_of(self, pre: Tensor) -> Tensor:
        return self._largest(pre, self.config.k)

    def _largest(self, pre: Tensor, k: int) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        norms = self.feature_norms()
        values, features, among = self.share.largest(pre if norms is None else pre * norms, k)
        values = values if among is None else values.where(among, 0)
        return torch.zeros_like(pre).scatter(-1, features, values.relu())

    # ---- training

    def losses(self, x: Tensor, step: StepInput) -> StepOutput:
        return self.losses_in(x, step, self.loss_unit(step.target_for(x)))

    def losses_in(self, x: Tensor, step: StepInput, unit: Tensor | None) -> StepOutput:
        """:meth:`losses`, counted in ``unit``, a scalar."""
        wanted, logged = (
            self.wanted_at(step, self.share.n(len(x))),
            self.logged_k(step),
        )  # before what a compiler follows
        pre = self.pre_activations(x)
        features = self.training_features(pre, wanted)
        output = self.reconstruction(features)
        target = step.target_for(x)
        mse = squared_errors(output, target).sum(-1).mean()
        aux = self.aux_loss(pre, target, output, step.dead)
        if unit is not None:
            mse, aux = mse / unit, aux / unit
        return StepOutput(
            loss=mse + aux,
            losses={"mse_loss": mse.detach(), "auxiliary_reconstruction_loss": aux.detach()},
            output=output.detach(),
            fired=(features.detach().abs() > 0).sum(0),
            coefficients=logged | self.after_features(features.detach()),
        )

    def training_features(self, pre: Tensor, wanted: int | None = None) -> Tensor:
        """Feature activations in training, ``[n, d_sae]`` both; ``wanted`` of each row, by default ``k``."""
        return self._largest(pre, self.config.k if wanted is None else wanted)

    def k_at(self, step: StepInput) -> float:
        """k at a step."""
        return self._moving_k(step) if self.config.k_warm_up_steps else self.config.k

    @not_compiled
    def _moving_k(self, step: StepInput) -> float:
        return k_at(self.config, step.step)

    def wanted_at(self, step: StepInput, rows: int) -> int:
        """How many features are to be active at a step on ``rows``, of each of them."""
        return self._moving(step, rows) if self.config.k_warm_up_steps else self._standing(rows)

    @not_compiled
    def _moving(self, step: StepInput, rows: int) -> int:
        return int(self.k_at(step))

    def _standing(self, rows: int) -> int:
        return self.config.k

    def logged_k(self, step: StepInput) -> dict[str, float | Tensor]:
        """``k``, where it changes."""
        return {"k": float(self.k_at(step))} if self.config.k_warm_up_steps else {}

    def loss_unit(self, target: Tensor) -> Tensor | None:
        """What the loss for ``target [n, d_out]`` is counted in, a scalar: their variance, summed over ``d_out``; 1
        where there is none.  None: nothing."""
        if self.config.mse_loss_normalization == "none":
            return None
        squares = (target - self.share.row_mean(target)).pow(2).sum()
        variance = self.share.total(squares) / self.share.n(len(target))
        return variance.where(variance > 0, 1)

    def after_features(self, features: Features) -> dict[str, float | Tensor]:
        """What the features of a training step change in the SAE; and what is logged of it."""
        return {}

    @property
    def aux_coefficient(self) -> float:
        return self.config.aux_weight

    def aux_weight(self, target: Tensor, output: Tensor) -> float | Tensor:
        if self.config.aux_loss_normalization == "none":
            return self.aux_coefficient
        if self.config.aux_loss_normalization == "share":
            return self.aux_coefficient * share_of_variance(target, output, self.share)
        return super().aux_weight(target, output)

    @property
    def aux_trains_encoder(self) -> bool:
        return self.config.aux_loss_trains_encoder

    @property
    def aux_shrinks(self) -> bool:
        return self.config.aux_loss_normalization == "none"

    @property
    def aux_above_zero(self) -> bool:
        return self.config.aux_loss_normalization == "share"

    # ---- saving

    def public_config(self) -> dict[str, Any]:
        return {
            "architecture": "topk",
            "k": self.config.k,
            "rescale_acts_by_decoder_norm": self.saved_options()["rescale_acts_by_decoder_norm"],
        }

    def saved_options(self) -> dict[str, Any]:
        """With the norms folded in, rows have norm 1; but for a factor of their own, which is folded in, too."""
        rescaled = self.config.rescale_acts_by_decoder_norm and self.scaling_factor is None
        return {**super().saved_options(), "rescale_acts_by_decoder_norm": rescaled}

    def public_tensors(self) -> dict[str, Tensor]:
        """With norms folded in.

        Rounded to bfloat16, products with them may choose other features: there they are folded for a scaling factor
        alone, where they must be.
        """
        tensors, norms = super().public_tensors(), self.norms_when_saved()
        if norms is not None:
            return tensors
        # Norms that differ from 1 by rounding alone were folded before: again, each save would move the last digits.
        if (norms := self.feature_norms()) is None or self.share.every(
            (norms - 1).abs() <= 4 * torch.finfo(norms.dtype).eps
        ):
            return tensors
        wide = torch.promote_types(norms.dtype, torch.float32)
        wider = {name: value.to(wide) if value.is_floating_point() else value for name, value in tensors.items()}
        made = folded(wider, norms.detach().cpu().to(wide))
        if norms.dtype != torch.bfloat16:
            return made
        return {name: value.to(tensors[name].dtype) for name, value in made.items()}

    def as_loaded(self) -> Self:
        if self.scaling_factor is None or self.feature_norms() is None or self.W_dec.dtype != torch.bfloat16:
            return super().as_loaded()
        own = copied(self)
        own._set_rescaling(False)
        own.load_public_tensors(self.public_tensors())
        return own

    def norms_when_saved(self) -> Tensor | None:
        """``[d_sae]``: the norms by which features of the saved tensors are still to be multiplied; None: by nothing.

        Where the decoder as it is saved has other norms, because of a scaling factor, they must be folded.
        """
        norms = self.feature_norms()
        if norms is None or norms.dtype != torch.bfloat16 or self.scaling_factor is not None:
            return None
        return None if self.share.every(norms == 1) else norms.detach().cpu()

    @torch.no_grad()
    def cast_weights(self, dtype: torch.dtype) -> None:
        norms = self.feature_norms()
        if norms is not None and dtype == torch.bfloat16 and self.W_dec.dtype != dtype:
            self._fold(norms)  # while there are digits for it
        super().cast_weights(dtype)

    @torch.no_grad()
    def fold_activation_scale(self, scale: Factor, target_scale: Factor | None = None) -> None:
        check_scales(scale, target_scale, self.ports)  # before anything is changed
        norms, target = self.feature_norms(), scale if target_scale is None else target_scale
        if norms is not None and isinstance(target, Tensor) and bool((target != target.flatten()[0]).any()):
            # Rows come to have other norms, each by a factor of its own: the norms until now are those that count.
            self._fold(norms)
            self._set_rescaling(False)
        super().fold_activation_scale(scale, target_scale)

    @torch.no_grad()
    def fold_affine(self, read: Affine, written: Affine | None = None) -> None:
        check_maps(read, written, self.ports)
        if (norms := self.feature_norms()) is not None:  # the same: a matrix changes each row's norm in its own way
            self._fold(norms)
            self._set_rescaling(False)
        super().fold_affine(read, written)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Where features are compared as if rows had norm 1, they stay as they are; else all norms must be one."""
        if self.config.rescale_acts_by_decoder_norm:
            self.restate("rescale_acts_by_decoder_norm", False, within=0)
        else:
            super().fold_W_dec_norm()

    def _check_sizes_are_free(self) -> None:
        norms = self.decoder_norms()
        factors = torch.where(norms > 0, norms, 1)
        if not bool((factors - factors.mean()).abs().max() <= 1e-3 * factors.mean()):
            raise ConfigError(
                f"norms cannot be folded into the encoder of a {self._name}, whose rows have norms from "
                f"{norms.min():.3g} to {norms.max():.3g}: features are compared by size, and others would win"
            )

    @torch.no_grad()
    def restate(self, option: str, value: Any, *, within: float) -> bool:
        """Without rescaling, with the norms folded in; with it, where all rows are of one norm.

        Rows of other norms would make other features the largest: what is decoded of a feature has, with rescaling, the
        norm by which it is compared.
        """
        if option != "rescale_acts_by_decoder_norm":
            return super().restate(option, value, within=within)
        norms = self.share.all_features(self.norms_of(self.W_dec))
        if value and not bool(((norms / norms.mean() - 1).abs() <= within).all()):
            return False
        if not value and (rescaling := self.feature_norms()) is not None:
            self._fold(rescaling)
        self._set_rescaling(value)
        return True

    def _set_rescaling(self, value: bool) -> None:
        self.config = attrs.evolve(self.config, rescale_acts_by_decoder_norm=value)
        self.info = attrs.evolve(self.info, options={**self.info.options, "rescale_acts_by_decoder_norm": value})

    def _fold(self, norms: Tensor) -> None:
        own = dict(self.named_parameters())
        for name, value in folded({name: own[name] for name in FOLDED}, norms).items():
            own[name].copy_(value)
