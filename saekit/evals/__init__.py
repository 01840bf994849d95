"""Measurements of an SAE in its model; eval plugins are made of these."""

from __future__ import annotations

from saekit._lazy import lazy_exports

__all__ = ["Reconstruction", "spliced_losses", "variance_metrics"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Reconstruction": "saekit.evals.variance",
        "variance_metrics": "saekit.evals.variance",
        "spliced_losses": "saekit.evals.splicing",
    },
)
