"""The mathematics and the steps of ``batchtopk``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit import Ports
from saekit.errors import SAEFormatError
from saekit.kernels import Encoder, Features, SparseFeatures, Workspace, active_groups, batch_top, screen_for, values_of
from saekit.protocols import ActivationFunction
from saekit.sae import Factor, check_width, not_compiled, one_factor
from saekit.values import StepInput
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.topk.module import TopKKernel, TopKSAE, from_zero

__all__ = ["BatchTopKSAE"]

_AVERAGE = ("threshold_average", "threshold_updates")  # what the threshold is made of; it is saved in their place


def _decimal(k: float) -> Fraction:
    """The decimal that was written, not the binary number next to it."""
    return Fraction(repr(float(k)))


class BatchTopKKernel(TopKKernel):
    """As :class:`TopKKernel`, but for which features are active."""

    spreads_over = frozenset({"data", "features"})
    leaves_weights = True

    def chosen(
        self, sae: Any, encoder: Encoder, centered: Tensor, norms: Tensor | None, wanted: int
    ) -> Iterator[tuple[int, SparseFeatures]]:
        screen = screen_for(encoder)
        yield 0, batch_top(encoder, centered, wanted, scale=norms, screen=screen, share=sae.share)

    def groups(self, sae: Any, rows: Tensor, workspace: Workspace) -> Iterator[tuple[int, Features]]:
        norms, encoder = sae.feature_norms(), self.encoder(sae, workspace)
        above = sae.threshold if norms is None else sae.threshold / norms
        groups = active_groups(encoder, sae.centered(rows), sae.activation, above=above, screen=screen_for(encoder))
        for start, group in groups:
            if isinstance(group, SparseFeatures):
                yield start, group.scaled(norms)
            else:
                yield start, group if norms is None else group.mul_(norms)


class BatchTopKSAE(TopKSAE):
    """See the module."""

    step_kernels = (BatchTopKKernel(),)
    spreads_over = frozenset({"data", "features", "inference"})
    competes_over = "all"
    saved_by_parts: ClassVar[Mapping[str, int]] = {"threshold": 0}
    beside_mathematics = frozenset({"trained_as"})
    config: BatchTopKConfig
    _name: ClassVar[str] = "batchtopk"
    threshold_average: Tensor
    threshold_updates: Tensor

    def __init__(self, config: BatchTopKConfig, *, ports: Ports, activation: ActivationFunction) -> None:
        super().__init__(config, ports=ports, activation=activation)
        # In float64, as otherwise small updates of a large average would be lost.
        for name in _AVERAGE:
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device="cpu"))
        self._k, self._start = _decimal(config.k), _decimal(config.k if config.k_start is None else config.k_start)

    @property
    def threshold(self) -> Tensor:
        """What a feature must exceed outside training: a scalar.

        The running average without its start at zero, as Adam corrects its moments.
        """
        started = 1 - (1 - self.config.threshold_lr) ** self.threshold_updates
        return (self.threshold_average / started).where(started > 0, 0).to(self.W_dec.dtype)

    def features_of(self, pre: Tensor) -> Tensor:
        check_width(pre, self.d_sae, "d_sae", "pre-activations")
        norms = self.feature_norms()
        features = (pre if norms is None else pre * norms).relu()
        return features * (features > self.threshold)

    # ---- training

    def training_features(self, pre: Tensor, wanted: int | None = None) -> Tensor:
        """``wanted`` of the whole batch, by default ``⌊k n⌋``."""
        norms = self.feature_norms()
        features = (pre if norms is None else pre * norms).relu().flatten()
        whole = self.wanted(self.share.n(len(pre))) if wanted is None else wanted
        values, places = features.topk(min(whole, len(features)), sorted=False)
        if self.share.split:
            values = values.where(self.share.largest_of_all(values, whole), 0)
        return torch.zeros_like(features).scatter(0, places, values).reshape(pre.shape)

    def wanted(self, rows: int) -> int:
        """``⌊k · rows⌋``, exactly: 29 for 0.29 and 100 rows, where a product of floats is a little below."""
        return self._k.numerator * rows // self._k.denominator

    @not_compiled
    def _moving_k(self, step: StepInput) -> float:
        return float(self._exact_k_at(step))

    def _exact_k_at(self, step: StepInput) -> Fraction:
        whole = self.config.k_warm_up_steps
        return self._k if step.step >= whole else self._start + (self._k - self._start) * step.step / whole

    @not_compiled
    def _moving(self, step: StepInput, rows: int) -> int:
        return int(self._exact_k_at(step) * rows)

    def _standing(self, rows: int) -> int:
        return self.wanted(rows)

    @torch.no_grad()
    def after_features(self, features: Features) -> dict[str, float | Tensor]:
        values = values_of(features)
        least = values.masked_fill(values <= 0, torch.inf).amin() if values.numel() else values.new_tensor(torch.inf)
        least = torch.stack(self.share.everybody(least)).amin() if self.share.split else least
        there, lr = least < torch.inf, self.config.threshold_lr
        average = (1 - lr) * self.threshold_average + lr * least.to(self.threshold_average.dtype)
        self.threshold_average.copy_(average.where(there, self.threshold_average))
        self.threshold_updates += there
        return {"topk_threshold": self.threshold}

    # ---- saving

    @torch.no_grad()
    def fold_activation_scale(self, scale: Factor, target_scale: Factor | None = None) -> None:
        super().fold_activation_scale(scale, target_scale)
        if self.config.rescale_acts_by_decoder_norm:  # features shrink with the decoder's norms
            self.threshold_average /= one_factor(scale if target_scale is None else target_scale)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        norm = None if self.config.rescale_acts_by_decoder_norm else self.decoder_norms().mean()
        super().fold_W_dec_norm()
        if norm is not None:
            self.threshold_average *= norm  # as features are, from now on

    @torch.no_grad()
    def restate(self, option: str, value: Any, *, within: float) -> bool:
        before, norm = self.config, self.share.all_features(self.norms_of(self.W_dec)).mean()
        if not super().restate(option, value, within=within):
            return False
        if self.config.rescale_acts_by_decoder_norm and not before.rescale_acts_by_decoder_norm:
            self.threshold_average *= norm  # as features are, from now on
        return True

    def public_config(self) -> dict[str, Any]:
        return {"architecture": "jumprelu", "metadata": self.trained_as()}

    def trained_as(self) -> dict[str, Any]:
        """What sae-lens says of it in ``metadata``, whose ``architecture`` is that of inference."""
        details = {"k": self.config.k, "topk_threshold_lr": self.config.threshold_lr}
        return {"training_architecture": "batchtopk", "training_architecture_details": details}

    def public_tensors(self) -> dict[str, Tensor]:
        tensors, norms = super().public_tensors(), self.norms_when_saved()
        for name in _AVERAGE:
            tensors.pop(name)
        threshold = self.threshold.detach().cpu().expand(self.d_sae)
        # For features that are not multiplied by their norms, in float32: rounded, it would choose others.
        if norms is not None:  # nothing is decoded of a row of norm 0
            threshold = (threshold.float() / norms.float()).clamp_max(torch.finfo(torch.float32).max)
        elif self.scaling_factor is None or not self.config.rescale_acts_by_decoder_norm:
            threshold = threshold.to(tensors["b_enc"].dtype)
        else:  # of features in which norms were folded
            threshold = threshold.to(torch.promote_types(tensors["b_enc"].dtype, torch.float32))
        return tensors | {"threshold": threshold.contiguous()}

    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = dict(tensors)
        threshold = tensors.pop("threshold", None)
        if threshold is None:
            raise SAEFormatError(f"the weights do not fit {self.info.architecture}: threshold is missing")
        average = [torch.zeros((), dtype=torch.float64), torch.tensor(torch.inf, dtype=torch.float64)]
        super().load_public_tensors(tensors | dict(zip(_AVERAGE, average, strict=True)))
        self.threshold_average.fill_(self._one_threshold(from_zero(threshold), tensors["W_dec"]))

    def _one_threshold(self, threshold: Tensor, W_dec: Tensor) -> float:
        """One for all features, from ``threshold [d_sae]`` as it is saved: in bfloat16 divided by the norms."""
        whole = threshold.shape == (self.d_sae,)
        threshold = self.share.all_features(threshold) if whole else threshold
        if whole and bool((threshold == threshold[0]).all()):
            return threshold[0].item()
        if whole and self.config.rescale_acts_by_decoder_norm and W_dec.dtype == torch.bfloat16:
            norms = self.share.all_features(self.norms_of(W_dec)).double()
            every = (threshold.double() * norms)[norms > 0]
            one = every.median()
            if bool(((every - one).abs() <= one * 2**-7).all()):  # a norm may be rounded otherwise on another machine
                return float(one.bfloat16())
        raise SAEFormatError(
            f"{self.info.architecture} has one threshold, as a tensor [{self.d_sae * self.share.parts}] of equal "
            f"numbers; found {list(threshold.shape)} with numbers from {threshold.min():.4g} to {threshold.max():.4g}"
        )
