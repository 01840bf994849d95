"""SAE architecture ``topk``: the k largest features of each row (Gao et al. 2024, "Scaling and evaluating SAEs")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import attrs

from saekit import ConfigError, Entry, SAEConfig, hookimpl
from saekit.config import NEEDED_TO_LOAD, SAME_AT_START, check
from saekit_plugins.architectures.coefficients import check_coefficients, check_k

_SUMMARY = "the k largest features of each row, AuxK for dead ones"
_at_least_0 = check(lambda value: value >= 0, "0 or more")
_at_least_1 = check(lambda value: value >= 1, "1 or more")


@attrs.frozen(kw_only=True)
class TopKConfig(SAEConfig):
    """``(mse + auxk) / unit``, where at most ``k`` features of a row are active: the largest above zero."""

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"saekit:adam": {"beta1": 0.9}}

    k: int = attrs.field(default=32, validator=_at_least_1, metadata={NEEDED_TO_LOAD: True})
    """Active features of a row."""
    k_start: int | None = attrs.field(default=None, validator=_at_least_1)
    """`k` at the first step, from which it goes to `k` in `k_warm_up_steps`: with many active features at first, few
    die."""
    k_warm_up_steps: int = attrs.field(default=0, validator=_at_least_0)
    """Steps over which k goes from `k_start` to `k`: step t of w has `k_start + (k − k_start) t / w`, rounded."""
    mse_loss_normalization: Literal["none", "variance"] = "none"
    """`variance`: the loss counts in units of the variance of the batch's targets, AuxK too: the squared error is then
    the fraction of the variance that is not explained (FVU), as in sparsify."""
    aux_loss_coefficient: float = attrs.field(default=1 / 32, validator=_at_least_0)
    """The weight of AuxK, by which dead features learn what the others leave over; 0: none."""
    aux_loss_normalization: Literal["residual_variance", "share", "none"] = "residual_variance"
    """`residual_variance`: AuxK counts in units of the variance that it can explain, as in the paper, but never for
    more than the squared error itself.  `none`: as a sum of squares, as in sae-lens, whose coefficient is 1; less where
    fewer than `k_aux` are dead.  `share`: as a share of the residual's variance, of pre-activations above zero alone,
    as in dictionary_learning, beside a squared error that is none."""
    k_aux: int | None = attrs.field(default=None, validator=_at_least_1)
    """Dead features of a row that AuxK trains.  None: half of `d_in`."""
    aux_loss_trains_encoder: bool = True
    """Whether AuxK trains the encoder, too.  Without it, dead features count in AuxK as they are after ReLU, and their
    decoder rows alone learn from it, as in sparsify."""
    rescale_acts_by_decoder_norm: bool = attrs.field(default=True, metadata={SAME_AT_START: True})
    """Compare features as if decoder rows had norm 1.  Norms are folded into the weights that are saved."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it."""
    decoder_heuristic_init: bool = True
    """Start from Gaussian decoder rows of norm 0.1."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "auto"
    """Start `b_dec` at zero, or at the mean or geometric median of the first activations.  `auto`: at their mean where
    that is most of what activations are, as with outlier dimensions: there the same few features would be the largest
    of every row, and the others never fire.  Else at zero."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_k(self)
        if not self.aux_loss_trains_encoder and not self.aux_weight:
            raise ConfigError([("aux_loss_trains_encoder", "is of AuxK, and aux_loss_coefficient is 0: leave it out")])

    def check_features(self, d_sae: int) -> None:
        """:class:`ConfigError` for what ``d_sae`` features cannot be asked for."""
        for name in ("k", "k_start"):
            if (k := getattr(self, name)) is not None and k > d_sae:
                raise ConfigError([(f"sae.{name}", f"is {k:g}, but there are only {d_sae} features")])

    @property
    def aux_weight(self) -> float:
        """``aux_loss_coefficient`` in numbers."""
        return self.aux_loss_coefficient


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build = f"{__name__}.module:TopKSAE"
    yield Entry("topk", TopKConfig, build, summary=_SUMMARY, precheck=check_coefficients)
