"""SAE architecture ``gated``: which features are active, and how much, are two questions with one encoder.

Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv 2404.16014).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit_plugins.architectures.coefficients import L1Options, at_least_0, check_coefficients


@attrs.frozen(kw_only=True)
class GatedConfig(L1Options):
    """``mse + λ_t l1 + aux``, where a feature is active if its gate is open, and the gates alone are made sparse.

    The sparsity penalty and the second reconstruction, by the gates' own values, are all that gates learn from.
    """

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"saekit:adam": {"beta1": 0.9}}

    l1_coefficient: float = attrs.field(default=2.0, validator=at_least_0)
    """λ, the weight of the sparsity penalty: the sum of the gates' values above zero."""
    normalize_sae_decoder: bool = True
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it.  So it is in the paper
    and in dictionary_learning, and in sae-lens it is not."""
    scale_sparsity_penalty_by_decoder_norm: bool = False
    """Weigh each gate's penalty by the norm of its decoder row, as in sae-lens."""
    aux_loss_trains_decoder: bool = False
    """Let the reconstruction by the gates' values train the decoder and its bias, too, as in sae-lens.  In the paper
    and in dictionary_learning it trains the gates alone."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "auto"
    """Start `b_dec` at zero, or at the mean or geometric median of the first activations.  `auto`: at their mean where
    that is most of what activations are, so that features start alive, else at zero."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.normalize_sae_decoder and self.scale_sparsity_penalty_by_decoder_norm:
            raise ConfigError(
                [("scale_sparsity_penalty_by_decoder_norm", "has no effect while normalize_sae_decoder keeps every "
                  "norm at 1; turn one of them off")]
            )  # fmt: skip


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:GatedSAE", "gates say which features are active, magnitudes how much"
    yield Entry("gated", GatedConfig, build, summary=summary, precheck=check_coefficients)
