"""Eval ``reconstruction``: how well and how sparsely an SAE reconstructs what the model holds."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from saekit import Entry, hookimpl
from saekit.config import check


@attrs.frozen(kw_only=True)
class ReconstructionConfig:
    """Explained variance, sparsity, norms and how often features fire, on held-out text."""

    batch_size_prompts: int = attrs.field(default=16, validator=check(lambda value: value >= 1, "1 or more"))
    """Contexts in one forward of the model."""
    n_bootstrap: int = attrs.field(default=1000, validator=check(lambda value: value >= 0, "0 or more"))
    """Resamples of the contexts for standard errors; 0: none."""


@hookimpl
def saekit_register_evals() -> Iterable[Entry]:
    build = f"{__name__}.module:ReconstructionEval"
    yield Entry("reconstruction", ReconstructionConfig, build, summary="explained variance, L0, norms, dead features")
