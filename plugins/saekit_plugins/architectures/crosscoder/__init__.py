"""SAE architectures ``crosscoder`` and ``batchtopk_crosscoder``: features that several sites share.

Each site has an encoder, a decoder and a bias of its own; a feature has one activation.  Lindsey et al. 2024, "Sparse
Crosscoders for Cross-Layer Features and Model Diffing" (transformer-circuits.pub); with the features of BatchTopK,
Minder et al. 2025, "Robustly Identifying Concepts Introduced During Chat Fine-Tuning Using Crosscoders" (arXiv
2504.02922), which are less often taken for those of one site alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from saekit import ConfigError, Entry, hookimpl
from saekit.config import NEEDED_TO_LOAD, SAME_AT_START
from saekit_plugins.architectures.batchtopk import BatchTopKConfig
from saekit_plugins.architectures.coefficients import L1Options, at_least_0, check_coefficients

if TYPE_CHECKING:
    from saekit.config import TrainConfig


@attrs.frozen(kw_only=True)
class CrosscoderConfig(L1Options):
    """``Σ_s ‖x_s − x̂_s‖² + λ_t mean_b Σ_i f_i Σ_s ‖W_dec,i^s‖``, over sites s and features i."""

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"saekit:adam": {"beta1": 0.9}}

    l1_coefficient: float = attrs.field(default=2.0, validator=at_least_0)
    """λ, the weight of the sparsity penalty."""
    decoder_norm: Literal["l1", "l2"] = "l1"
    """How the norms of a feature's decoder rows, one for each site, become the weight of its penalty.  `l1`: their sum,
    by which a feature of several sites costs what as many features of one site cost.  `l2`: the norm of all of them
    side by side, by which it costs less."""
    apply_b_dec_to_input: bool = attrs.field(default=False, metadata={NEEDED_TO_LOAD: True})
    """Subtract the decoders' biases from the inputs, where the same sites are read and written."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row, over all sites, at norm 1: project the gradient before each step, rescale after it."""
    decoder_heuristic_init: bool = True
    """Start from Gaussian decoder rows of norm 0.1, over all sites."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`, site by site."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "auto"
    """Start the decoders' biases at zero, or at the mean or geometric median of the first targets.  `auto`: at their
    mean where that is most of what they are, else at zero."""


@attrs.frozen(kw_only=True)
class BatchTopKCrosscoderConfig(BatchTopKConfig):
    """``batchtopk`` of several sites, whose features are compared by ``f_i Σ_s ‖W_dec,i^s‖``; no penalty."""

    apply_b_dec_to_input: bool = attrs.field(default=False, metadata={NEEDED_TO_LOAD: True})
    """Subtract the decoders' biases from the inputs, where the same sites are read and written."""
    rescale_acts_by_decoder_norm: bool = attrs.field(default=True, metadata={SAME_AT_START: True})
    """Compare features as if the norms of their decoder rows, one for each site, had the sum 1.  Norms are folded into
    the weights that are saved."""


def _precheck(options: Any, whole: TrainConfig) -> None:
    check_coefficients(options, whole)
    if len(whole.sites.all) > 1:
        return
    one = "batchtopk" if isinstance(options, BatchTopKConfig) else "standard"
    raise ConfigError(
        [("inputs", f"there is one site alone ({whole.sites.name}), and a crosscoder is for several: name them in "
          f"inputs, and in targets where others are written. For one site, sae.name is '{one}'")]
    )  # fmt: skip


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    for name, config, build, summary in (
        ("crosscoder", CrosscoderConfig, "CrosscoderSAE", "features that several sites share, an L1 penalty"),
        (
            "batchtopk_crosscoder",
            BatchTopKCrosscoderConfig,
            "BatchTopKCrosscoderSAE",
            "features that several sites share, the largest of a batch",
        ),
    ):
        yield Entry(name, config, f"{__name__}.module:{build}", summary=summary, precheck=_precheck)
