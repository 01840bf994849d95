"""SAE architecture ``standard``: one hidden layer and a sparsity penalty (Bricken et al., Anthropic, 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import check
from saekit_plugins.architectures.coefficients import L1Options, check_coefficients

_at_least_0 = check(lambda value: value >= 0, "0 or more")


@attrs.frozen(kw_only=True)
class StandardConfig(L1Options):
    """``mse + λ_t mean_b ‖f ⊙ w‖_p + ghost``."""

    lp_norm: float = attrs.field(default=1.0, validator=check(lambda value: value > 0, "above 0", finite=False))
    """p, the norm of the penalty."""
    scale_sparsity_penalty_by_decoder_norm: bool = False
    """Weigh each feature's penalty by the norm of its decoder row."""
    mse_loss_normalization: Literal["none", "dense_batch"] = "none"
    """`dense_batch` divides each row's squared error by its distance from the batch's mean."""
    noise_scale: float = attrs.field(default=0.0, validator=_at_least_0)
    """Standard deviation of the Gaussian noise on pre-activations in training; 0 draws nothing."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`: features that read what they write die less often."""
    use_ghost_grads: bool = False
    """Let dead features learn to predict what is left over."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.normalize_sae_decoder and self.scale_sparsity_penalty_by_decoder_norm:
            raise ConfigError(
                [("scale_sparsity_penalty_by_decoder_norm", "has no effect while normalize_sae_decoder keeps every "
                  "norm at 1; turn one of them off")]
            )  # fmt: skip


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build = f"{__name__}.module:StandardSAE"
    summary = "one hidden layer, an Lp sparsity penalty"
    yield Entry("standard", StandardConfig, build, summary=summary, precheck=check_coefficients)
