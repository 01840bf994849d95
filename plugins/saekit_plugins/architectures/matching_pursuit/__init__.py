"""SAE architecture ``matching_pursuit``: one feature after the other, each of what those before it leave over.

"From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit" (arXiv 2506.03093), as sae-lens
has it.  For inference alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, SAEConfig, hookimpl
from saekit.config import NEEDED_TO_LOAD, check
from saekit_plugins.architectures.for_inference import refuse_training


@attrs.frozen(kw_only=True)
class MatchingPursuitConfig(SAEConfig):
    """When a row has enough features.  The encoder is the decoder's transpose."""

    residual_threshold: float = attrs.field(
        default=1e-2, validator=check(lambda value: value >= 0, "0 or more"), metadata={NEEDED_TO_LOAD: True}
    )
    """A row is done where the norm of what is left over is below this; 0: never for that."""
    max_iterations: int | None = attrs.field(
        default=None, validator=check(lambda value: value >= 1, "1 or more"), metadata={NEEDED_TO_LOAD: True}
    )
    """The most features that are taken for a row, one that is taken twice counted twice.  None: `d_in`."""
    stop_on_duplicate_support: bool = attrs.field(default=True, metadata={NEEDED_TO_LOAD: True})
    """A row is done where the feature that was taken last was active before."""
    normalize_sae_decoder: bool = False
    """Keep every decoder row at norm 1."""


@hookimpl
def saekit_register_sae_architectures() -> Iterable[Entry]:
    build, summary = f"{__name__}.module:MatchingPursuitSAE", "one feature after the other, for inference alone"
    yield Entry("matching_pursuit", MatchingPursuitConfig, build, summary=summary, precheck=refuse_training)
