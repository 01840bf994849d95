"""SAE architecture ``my_crosscoder``: features that several sites share, each with a decoder of its own.

Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".  A feature's penalty is its
activation times the sum of its decoders' norms: ``Σ_s ‖x_s − x̂_s‖² + λ Σ_i f_i Σ_s ‖W_dec,i^s‖``.
"""

from typing import ClassVar

import attrs

from saekit import Entry, SAEConfig, hookimpl
from saekit.config import NEEDED_TO_LOAD, check

at_least_0 = check(lambda value: value >= 0, "0 or more")


@attrs.frozen(kw_only=True)
class CrosscoderConfig(SAEConfig):
    """``mse + λ_t mean_b Σ_i f_i Σ_s ‖W_dec,i^s‖``."""

    optimizer_defaults: ClassVar = {"saekit:adam": {"beta1": 0.9}}

    l1_coefficient: float = attrs.field(default=2.0, validator=at_least_0)
    """λ, the weight of the penalty."""
    l1_warm_up_steps: int = attrs.field(default=0, validator=at_least_0)
    """Steps over which λ rises from 0."""
    apply_b_dec_to_input: bool = attrs.field(default=False, metadata={NEEDED_TO_LOAD: True})
    """Subtract the decoders' biases from the inputs."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row, over all sites, at norm 1."""
    decoder_heuristic_init: bool = True
    """Start from Gaussian decoder rows of norm 0.1."""
    init_encoder_as_decoder_transpose: bool = True
    """Start from `W_enc = W_dec.T`."""

    def l1_at(self, step: int) -> float:
        return self.l1_coefficient * min(1.0, step / self.l1_warm_up_steps if self.l1_warm_up_steps else 1.0)


@hookimpl
def saekit_register_sae_architectures():
    yield Entry("my_crosscoder", CrosscoderConfig, f"{__name__}.module:Crosscoder", summary="features of several sites")
