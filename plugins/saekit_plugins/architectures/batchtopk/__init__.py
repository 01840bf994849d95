"""SAE architecture ``batchtopk``: the largest features of a whole batch, k for each row on average.

Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".  Outside training, features are active above a threshold, the
average of the least active feature of each batch.  It is saved as what other libraries call a JumpReLU SAE.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.config import NEEDED_TO_LOAD, check
from saekit_plugins.architectures.coefficients import check_coefficients
from saekit_plugins.architectures.topk import TopKConfig


@attrs.frozen(kw_only=True)
class BatchTopKConfig(TopKConfig):
    """``(mse + auxk) / unit``, where a batch of n rows has at most ``k n`` active features: the largest above zero."""

    k: float = attrs.field(  # type: ignore[assignment]
        default=32.0, validator=check(lambda value: value > 0, "above 0"), metadata={NEEDED_TO_LOAD: True}
    )
    """Active features of a row, on average."""
    k_start: float | None = attrs.field(  # type: ignore[assignment]
        default=None, validator=check(lambda value: value > 0, "above 0")
    )
    """`k` at the first step, from which it goes to `k` in `k_warm_up_steps`: with many active features at first, few
    die."""
    aux_loss_coefficient: float | None = attrs.field(  # type: ignore[assignment]
        default=None, validator=check(lambda value: value >= 0, "0 or more")
    )
    """The weight of AuxK, by which dead features learn what the others leave over; 0: none.  None: `2 / k`, at most
    1/4.  That is more than for `topk`, and the more the smaller k is, since a feature that comes back has to be among
    the largest of a whole batch."""
    threshold_lr: float = attrs.field(default=0.01, validator=check(lambda value: 0 < value <= 1, "above 0, at most 1"))
    """How much of each batch's least active feature goes into the running average that becomes the threshold."""

    @property
    def aux_weight(self) -> float:
        return min(2 / self.k, 1 / 4) if self.aux_loss_coefficient is None else self.aux_loss_coefficient


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:BatchTopKSAE", "the largest features of a batch, k for each row on average"
    yield Entry("batchtopk", BatchTopKConfig, build, summary=summary, precheck=check_coefficients)
