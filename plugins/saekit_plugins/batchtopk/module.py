"""The mathematics and the steps of ``batchtopk``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.errors import SAEFormatError
from saekit.protocols import ActivationFunction
from saekit.sae import Encoder, Features, SparseFeatures, active_groups, batch_top, screen_for
from saekit_plugins.batchtopk import BatchTopKConfig
from saekit_plugins.topk.module import TopKSAE

__all__ = ["BatchTopKSAE"]


class BatchTopKSAE(TopKSAE):
    """See the module."""

    config: BatchTopKConfig

    def __init__(self, config: BatchTopKConfig, *, d_in: int, activation: ActivationFunction) -> None:
        super().__init__(config, d_in=d_in, activation=activation)
        # In float64, as otherwise small updates of a large average would be lost.
        self.register_buffer("threshold_average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.float64))

    @property
    def threshold(self) -> Tensor:
        """What a feature must exceed outside training: a scalar.

        The running average without its start at zero, as Adam corrects its moments.
        """
        started = 1 - (1 - self.config.threshold_lr) ** self.threshold_updates
        return (self.threshold_average / started).where(started > 0, 0).to(self.W_dec.dtype)

    def features_of(self, pre: Tensor) -> Tensor:
        norms = self.feature_norms()
        features = (pre if norms is None else pre * norms).relu()
        return features * (features > self.threshold)

    # ---- training

    def training_features(self, pre: Tensor) -> Tensor:
        norms = self.feature_norms()
        features = (pre if norms is None else pre * norms).relu().flatten()
        values, places = features.topk(self._wanted(len(pre)), sorted=False)
        return torch.zeros_like(features).scatter(0, places, values).reshape(pre.shape)

    def _wanted(self, rows: int) -> int:
        return int(self.config.k * rows)

    @torch.no_grad()
    def after_features(self, features: Features) -> dict[str, float | Tensor]:
        values = features.values if isinstance(features, SparseFeatures) else features
        least = values.masked_fill(values <= 0, torch.inf).amin() if values.numel() else values.new_tensor(torch.inf)
        there, lr = least < torch.inf, self.config.threshold_lr
        average = (1 - lr) * self.threshold_average + lr * least.double()
        self.threshold_average.copy_(average.where(there, self.threshold_average))
        self.threshold_updates += there
        return {"topk_threshold": self.threshold}

    def why_no_fast_path(self, *, training: bool) -> str | None:
        return super().why_no_fast_path(training=training)  # this class has its own features_of, and kernels for it

    def training_groups(self, centred: Tensor, norms: Tensor | None) -> Iterator[tuple[int, SparseFeatures]]:
        encoder = Encoder(self.W_enc.detach(), self.b_enc.detach())
        wanted = self._wanted(len(centred))
        yield 0, batch_top(encoder, centred, wanted, scale=norms, screen=screen_for(encoder))

    def feature_groups(self, rows: Tensor) -> Iterator[tuple[int, Features]]:
        norms = self.feature_norms()
        above = self.threshold if norms is None else self.threshold / norms
        encoder = Encoder(self.W_enc.detach(), self.b_enc.detach())
        groups = active_groups(encoder, self.centred(rows), self.activation, above=above, screen=screen_for(encoder))
        for start, group in groups:
            if isinstance(group, SparseFeatures):
                yield start, group.scaled(norms)
            else:
                yield start, group if norms is None else group.mul_(norms)

    # ---- saving

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        super().fold_activation_scale(scale)
        if self.config.rescale_acts_by_decoder_norm:  # features shrink with the decoder's norms
            self.threshold_average /= scale

    def public_config(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}

    def public_tensors(self) -> dict[str, Tensor]:
        threshold = self.threshold.detach().cpu()
        return super().public_tensors() | {"threshold": threshold.expand(self.d_sae).contiguous()}

    def load_public_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = dict(tensors)
        threshold = tensors.pop("threshold", None)
        if threshold is None:
            raise SAEFormatError(f"the weights do not fit {self.info.architecture}: threshold is missing")
        if threshold.shape != (self.d_sae,) or not bool((threshold == threshold[0]).all()):
            raise SAEFormatError(
                f"{self.info.architecture} has one threshold, as a tensor [{self.d_sae}] of equal numbers; found "
                f"{list(threshold.shape)} with numbers from {threshold.min():.4g} to {threshold.max():.4g}"
            )
        super().load_public_tensors(tensors)
        self.threshold_average.fill_(threshold[0].item())
        self.threshold_updates.fill_(torch.inf)
