"""Measurements of an SAE in its model; eval plugins are made of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit._lazy import lazy_exports

if TYPE_CHECKING:
    from saekit.evals.splicing import spliced_losses
    from saekit.evals.variance import Reconstruction, variance_metrics

__all__ = ["Reconstruction", "spliced_losses", "variance_metrics"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Reconstruction": "saekit.evals.variance",
        "variance_metrics": "saekit.evals.variance",
        "spliced_losses": "saekit.evals.splicing",
    },
)
