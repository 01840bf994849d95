"""What every SAE architecture has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from saekit.config.fields import NEEDED_TO_LOAD, PluginChoice, a_size, check, plugin_field
from saekit.config.sae_lens_names import OF_CONFIGS
from saekit.defaults import DEFAULT_ACTIVATION
from saekit.errors import ConfigError
from saekit.kinds import ACTIVATION_FUNCTIONS

__all__ = ["SAEConfig"]


@attrs.frozen(kw_only=True)
class SAEConfig:
    """What every SAE architecture has.  Architecture plugins derive their options from this class."""

    optimizer_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What options of optimizers that are None are for this architecture, by the optimizer's qualified key:
    `{"saekit:adam": {"beta1": 0.9}}`."""

    d_in: int | None = attrs.field(default=None, validator=a_size, metadata={NEEDED_TO_LOAD: True})
    """The width of what is read: of the site, or of all inputs side by side.  None: found by running the model once.  A
    stated width that is wrong is an error."""
    d_sae: int | None = attrs.field(default=None, validator=a_size, metadata={NEEDED_TO_LOAD: True})
    """The number of features."""
    expansion_factor: int | None = attrs.field(default=None, validator=check(lambda v: v >= 1, "1 or more", most=2**20))
    """The number of features as a multiple of `d_in`, instead of `d_sae`.  Neither given: 16."""
    activation: PluginChoice = plugin_field(ACTIVATION_FUNCTIONS, DEFAULT_ACTIVATION, metadata={NEEDED_TO_LOAD: True})
    """The non-linearity."""
    apply_b_dec_to_input: bool = attrs.field(default=True, metadata={NEEDED_TO_LOAD: True})
    """Subtract the decoder's bias from the input."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """The type of the SAE's weights.  In `bfloat16` it is saved and measured; it trains with products in bfloat16, and
    with weights and the optimizer's moments in float32."""
    normalize_sae_decoder: bool = True
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it."""
    decoder_orthogonal_init: bool = False
    """Start from a decoder with orthogonal columns."""
    decoder_heuristic_init: bool = False
    """Start from Gaussian decoder rows of norm 0.1."""
    init_encoder_as_decoder_transpose: bool = False
    """Start from `W_enc = W_dec.T`."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median", "auto"] = "zeros"
    """Start `b_dec` at zero, or at the mean or geometric median of the first activations.  `auto`: at their mean where
    that is most of what activations are, so that features start alive, else at zero."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """There is none: the error knows names of sae-lens, which has more in ``sae.cfg``."""
            known = f", as that of sae-lens has: here it is {OF_CONFIGS[name]}" if name in OF_CONFIGS else ""
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{known}", name=name, obj=self
            )

    def __attrs_post_init__(self) -> None:
        if self.d_sae is not None and self.expansion_factor is not None:
            raise ConfigError([("expansion_factor", "give d_sae or expansion_factor, not both")])
        if self.decoder_heuristic_init and self.normalize_sae_decoder:
            raise ConfigError(
                [("decoder_heuristic_init", "starts from rows of norm 0.1, which normalize_sae_decoder sets to 1; "
                  "set sae.normalize_sae_decoder=false")]
            )  # fmt: skip
        if self.decoder_heuristic_init and self.decoder_orthogonal_init:
            raise ConfigError([("decoder_heuristic_init", "choose one of decoder_heuristic_init and "
                                "decoder_orthogonal_init")])  # fmt: skip

    @property
    def starts_from_activations(self) -> bool:
        """Whether starting values are made of a sample of activations to come."""
        return self.b_dec_init_method != "zeros"

    def features(self, d_in: int) -> int:
        """``d_sae`` at a site of width ``d_in``."""
        return self.d_sae or d_in * (self.expansion_factor or 16)
