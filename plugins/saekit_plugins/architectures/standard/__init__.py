"""SAE architecture ``standard``: one hidden layer and a sparsity penalty (Bricken et al., Anthropic, 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import attrs

from saekit import ConfigError, Entry, SAEConfig, hookimpl
from saekit.config import check

if TYPE_CHECKING:
    from saekit.config import TrainConfig

_at_least_0 = check(lambda value: value >= 0, "0 or more")


@attrs.frozen(kw_only=True)
class StandardConfig(SAEConfig):
    """``mse + λ_t mean_b ‖f ⊙ w‖_p + ghost``."""

    l1_coefficient: float = attrs.field(default=5.0, validator=_at_least_0)
    """λ, the weight of the sparsity penalty."""
    l1_warm_up_steps: int = attrs.field(default=0, validator=_at_least_0)
    """Steps over which λ rises from 0: step t of w has `λ t / w`."""
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
    yield Entry("standard", StandardConfig, build, summary=summary, precheck=check_warm_up)


def check_warm_up(options: Any, whole: TrainConfig) -> None:
    """:class:`ConfigError` where training ends before λ is what was asked for."""
    steps = whole.training.steps
    for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if (rising := getattr(options, name, 0)) > steps:
            raise ConfigError(
                [(f"sae.{name}", f"is {rising:,}, and training has {steps:,} steps, so {name[:2]}_coefficient would "
                  "never be reached; lower it, or train longer (training.training_tokens)")]
            )  # fmt: skip


def l1_coefficient_at(config: Any, step: int) -> float:
    """λ of ``config`` at ``step``: linear from 0, so the first step of a warm-up has no penalty."""
    rising: int = config.l1_warm_up_steps
    whole: float = config.l1_coefficient
    return whole * min(1.0, step / rising) if rising else whole
