"""SAE architecture ``jumprelu``: features above a threshold of their own, which is learned, too.

Rajamanoharan et al. 2024, "Jumping Ahead" (arXiv 2407.14435), and, with ``sparsity_loss = "tanh"``, the Anthropic
interpretability team's update of January 2025.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from saekit import ConfigError, Entry, SAEConfig, hookimpl
from saekit.config import check
from saekit_plugins.architectures.coefficients import at_least_0, check_coefficients, check_decay, coefficient_at

if TYPE_CHECKING:
    from saekit import StepInput

_above_0 = check(lambda value: value > 0, "above 0")


@attrs.frozen(kw_only=True)
class JumpReLUConfig(SAEConfig):
    """``mse + λ_t sparsity + μ pre_act + auxk``, with ``f = z`` where ``z`` exceeds the threshold of the feature.

    A jump has no slope: thresholds learn by an estimate of it from the pre-activations near by.
    """

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"saekit:adam": {"beta1": 0.9}}

    l0_coefficient: float = attrs.field(default=0.5, validator=at_least_0)
    """λ, the weight of the sparsity loss."""
    l0_warm_up_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps over which λ rises from 0: step t of w has `λ t / w`."""
    l0_decay_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps at the end of training over which λ goes to `l0_end`: step j of the last n has `λ + (l0_end − λ) j / n`."""
    l0_end: float = attrs.field(default=0.0, validator=at_least_0)
    """Where λ goes in `l0_decay_steps`."""
    sparsity_loss: Literal["l0", "target_l0", "tanh"] = "l0"
    """`l0`: the number of active features of a row.  `target_l0`: `2 (l0 − L)² / L`, which draws it to L.  `tanh`: the
    sum of `tanh(c f ‖w‖)` over the features, `w` their decoder rows."""
    target_l0: float | None = attrs.field(default=None, validator=_above_0)
    """L of the sparsity loss `target_l0`."""
    tanh_scale: float = attrs.field(default=4.0, validator=_above_0)
    """c of the sparsity loss `tanh`."""
    pre_act_loss_coefficient: float = attrs.field(default=0.0, validator=at_least_0)
    """μ, the weight of what draws dead features up: the sum over them of `max(threshold − z, 0) ‖w‖`."""
    bandwidth: float = attrs.field(default=1.0, validator=_above_0)
    """The width of the window around a threshold whose pre-activations say where it should go.  Like thresholds and λ
    it is for activations of a norm near √d_in (`activations.normalize_activations`)."""
    initial_threshold: float = attrs.field(default=0.5, validator=at_least_0)
    """Every threshold at the start."""
    ste_to_input: bool = True
    """Let the estimate of the jump's slope pass to pre-activations, too, and so to the encoder, as Anthropic does.
    Without it thresholds alone learn to be sparse, at most a learning rate per step; short runs end with many active
    features."""
    aux_loss_coefficient: float = attrs.field(default=1 / 32, validator=at_least_0)
    """The weight of AuxK, by which dead features learn what the others leave over, in units of the variance that it can
    explain, but never for more than the squared error itself; 0: none."""
    k_aux: int | None = attrs.field(default=None, validator=check(lambda value: value >= 1, "1 or more"))
    """Dead features of a row that AuxK trains.  None: half of `d_in`."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it."""
    decoder_heuristic_init: bool = True
    """Start from Gaussian decoder rows of norm 0.1."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "auto"
    """Start `b_dec` at zero, or at the mean or geometric median of the first activations.  `auto`: at their mean where
    that is most of what activations are, so that features start alive, else at zero."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_decay(self, "l0")
        if (self.target_l0 is not None) != (self.sparsity_loss == "target_l0"):
            raise ConfigError([("target_l0", "is the L of sparsity_loss=target_l0: give both, or neither")])
        if self.sparsity_loss != "tanh" and self.tanh_scale != attrs.fields(JumpReLUConfig).tanh_scale.default:
            raise ConfigError(
                [("tanh_scale", f"is the c of sparsity_loss=tanh, and that is {self.sparsity_loss!r}: leave it "
                  "out")]
            )  # fmt: skip
        if self.k_aux is not None and not self.aux_loss_coefficient:
            raise ConfigError([("k_aux", "is for AuxK, and aux_loss_coefficient is 0: leave it out")])

    def l0_at(self, step: StepInput) -> float:
        """λ at a step."""
        return coefficient_at(self, "l0", step)


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build = f"{__name__}.module:JumpReLUSAE"
    summary = "features above thresholds of their own, which are learned"
    yield Entry("jumprelu", JumpReLUConfig, build, summary=summary, precheck=check_coefficients)
