"""SAE architectures that write another site than they read.

Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits" (arXiv 2406.11944); with a skip connection
Paulo et al. 2025, "Transcoders Beat Sparse Autoencoders for Interpretability" (arXiv 2501.18823).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from saekit import ConfigError, Entry, SAEConfig, hookimpl
from saekit.config import CHOOSES_START, NEEDED_TO_LOAD, check
from saekit_plugins.architectures.coefficients import check_coefficients
from saekit_plugins.architectures.groupmax import GroupMaxConfig
from saekit_plugins.architectures.jumprelu import JumpReLUConfig
from saekit_plugins.architectures.standard import StandardConfig
from saekit_plugins.architectures.topk import TopKConfig

if TYPE_CHECKING:
    from saekit.config import TrainConfig


def _no_b_dec_of_inputs(_: object, attribute: Any, value: bool) -> None:
    if value:
        raise ConfigError(
            [(attribute.name, "is not for transcoders, whose b_dec belongs to the targets; leave it out")]
        )


_NOT_FROM_ZERO = {
    "normalize_sae_decoder": "keeps decoder rows at norm 1, and decoder_zero_init starts them at 0",
    "decoder_heuristic_init": "starts from decoder rows of norm 0.1, and decoder_zero_init from 0",
    "decoder_orthogonal_init": "starts from an orthogonal decoder, and decoder_zero_init from 0",
    "init_encoder_as_decoder_transpose": "makes the encoder of the decoder, which decoder_zero_init starts at 0",
    "rescale_acts_by_decoder_norm": "compares features by the norms of decoder rows, which decoder_zero_init starts "
    "at 0",
}


@attrs.frozen(kw_only=True, slots=False)  # of two bases with slots there can be no class
class TranscoderOptions(SAEConfig):
    """What is another than in an SAE, whatever the features are."""

    apply_b_dec_to_input: bool = attrs.field(
        default=False, validator=_no_b_dec_of_inputs, metadata={NEEDED_TO_LOAD: True}
    )
    """Always false: the decoder's bias is in the space of the targets."""
    skip_connection: bool = attrs.field(default=False, metadata={NEEDED_TO_LOAD: True})
    """Add `x W_skip.T`, by which features need not learn what is linear.  `W_skip` starts at zero."""
    init_encoder_as_decoder_transpose: bool = False
    """Start from `W_enc = W_dec.T`, where targets are as wide as inputs."""
    decoder_zero_init: bool = attrs.field(default=False, metadata={CHOOSES_START: True})
    """Start from `W_dec = 0`, as sparsify does: outputs are those of the bias and the skip connection at first."""
    b_enc_init_method: Literal["zeros", "centered"] = attrs.field(default="zeros", metadata={CHOOSES_START: True})
    """Start `b_enc` at zero, or at minus what the encoder makes of the mean of the first inputs, as sparsify does."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.decoder_zero_init:
            return
        for name, why in _NOT_FROM_ZERO.items():
            if getattr(self, name, False):
                raise ConfigError([(name, f"{why}; set it to false, or decoder_zero_init")])

    @property
    def starts_from_activations(self) -> bool:
        return super().starts_from_activations or self.b_enc_init_method != "zeros"


@attrs.frozen(kw_only=True)
class TranscoderConfig(TranscoderOptions, StandardConfig):
    """``standard`` from one site to another: ``ŷ = relu(x W_enc + b_enc) W_dec + b_dec``."""

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"saekit:adam": {"beta1": 0.9}}

    l1_coefficient: float = attrs.field(default=1.0, validator=check(lambda value: value >= 0, "0 or more"))
    """λ, the weight of the sparsity penalty."""
    scale_sparsity_penalty_by_decoder_norm: bool = True
    """Weigh each feature's penalty by the norm of its decoder row."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it."""
    decoder_heuristic_init: bool = True
    """Start from Gaussian decoder rows of norm 0.1."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "auto"
    """Start `b_dec` at zero, or at the mean or geometric median of the first targets.  `auto`: at their mean where that
    is most of what they are, else at zero."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.skip_connection and self.mse_loss_normalization != "none":
            raise ConfigError(
                [("mse_loss_normalization", "is not for transcoders with a skip_connection; leave it out")]
            )


@attrs.frozen(kw_only=True)
class JumpReLUTranscoderConfig(TranscoderOptions, JumpReLUConfig):
    """``jumprelu`` from one site to another."""


@attrs.frozen(kw_only=True)
class TopKTranscoderConfig(TranscoderOptions, TopKConfig):
    """``topk`` from one site to another."""


@attrs.frozen(kw_only=True)
class GroupMaxTranscoderConfig(TranscoderOptions, GroupMaxConfig):
    """``groupmax`` from one site to another."""


def _precheck(options: Any, whole: TrainConfig) -> None:
    check_coefficients(options, whole)
    if not whole.sites.same:
        return
    found = "names the very sites that are read" if whole.targets else "is missing"
    sae = next(name for name, kind in _SAES.items() if isinstance(options, kind))
    raise ConfigError(
        [("targets", f"{found}: a transcoder gives the activations at other sites than it reads ({whole.sites.name}). "
          f"Name them in targets, and what is read in inputs; for what gives back what it reads, sae.name is '{sae}'")]
    )  # fmt: skip


_SAES: Mapping[str, type] = {
    "standard": StandardConfig, "jumprelu": JumpReLUConfig, "groupmax": GroupMaxConfig, "topk": TopKConfig,
}  # fmt: skip


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    for name, config, build in (
        ("transcoder", TranscoderConfig, "TranscoderSAE"),
        ("jumprelu_transcoder", JumpReLUTranscoderConfig, "JumpReLUTranscoderSAE"),
        ("topk_transcoder", TopKTranscoderConfig, "TopKTranscoderSAE"),
        ("groupmax_transcoder", GroupMaxTranscoderConfig, "GroupMaxTranscoderSAE"),
    ):
        kind = name.removesuffix("transcoder").strip("_") or "standard"
        summary = f"{kind}, to another site"
        yield Entry(name, config, f"{__name__}.module:{build}", summary=summary, precheck=_precheck)
