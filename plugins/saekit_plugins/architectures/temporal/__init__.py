"""SAE architecture ``temporal``: features of what attention over the positions before does not predict.

"Priors in Time: Missing Inductive Biases for Language Model Interpretability" (arXiv 2511.01836), as sae-lens has it.
For inference alone.  It reads whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs

from saekit import Entry, SAEConfig, hookimpl
from saekit.config import NEEDED_TO_LOAD, check
from saekit_plugins.architectures.for_inference import refuse_training

_at_least_1 = check(lambda value: value >= 1, "1 or more")


@attrs.frozen(kw_only=True)
class TemporalConfig(SAEConfig):
    """Attention layers that predict, and the features of what is new."""

    n_heads: int = attrs.field(default=8, validator=_at_least_1, metadata={NEEDED_TO_LOAD: True})
    """Attention heads of each layer."""
    n_attn_layers: int = attrs.field(
        default=1, validator=check(lambda value: value >= 0, "0 or more"), metadata={NEEDED_TO_LOAD: True}
    )
    """Layers, each of which predicts what those before it leave over."""
    bottleneck_factor: int = attrs.field(default=64, validator=_at_least_1, metadata={NEEDED_TO_LOAD: True})
    """Queries and keys have `d_sae / bottleneck_factor` numbers."""
    sae_diff_type: Literal["relu", "topk"] = attrs.field(default="topk", metadata={NEEDED_TO_LOAD: True})
    """Which features of what is new are active: those above zero, or the largest of them."""
    kval_topk: int | None = attrs.field(default=None, validator=_at_least_1, metadata={NEEDED_TO_LOAD: True})
    """How many, with `topk`.  None: as many as are above zero."""
    tied_weights: bool = attrs.field(default=True, metadata={NEEDED_TO_LOAD: True})
    """The encoder is the decoder's transpose."""
    input_scale: float = attrs.field(
        default=1.0, validator=check(lambda value: value > 0, "above 0"), metadata={NEEDED_TO_LOAD: True}
    )
    """What inputs are multiplied by before all else, and outputs divided by after it."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row at norm 1."""


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = (
        f"{__name__}.module:TemporalSAE",
        "features of what attention does not predict, for inference alone",
    )
    yield Entry("temporal", TemporalConfig, build, summary=summary, precheck=refuse_training)
