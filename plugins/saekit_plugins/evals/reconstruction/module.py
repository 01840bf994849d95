"""What the eval sums up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saekit import Sites
from saekit.evals import (
    ROW_MEASURES,
    AccumulatingEval,
    Sums,
    Totals,
    add_rows,
    counted_of_rows,
    row_metrics,
    row_sums,
)
from saekit.measuring import Needs, Seen
from saekit.sae import SAEModule
from saekit.values import EvalRun
from saekit_plugins.evals.reconstruction import ReconstructionConfig


class ReconstructionEval(AccumulatingEval):
    """Rows, their reconstructions and their features."""

    measures = ROW_MEASURES
    shares_contexts = True

    def __init__(self, config: ReconstructionConfig, *, run: EvalRun | None = None) -> None:
        self.config = config
        self.n_bootstrap = config.n_bootstrap

    @property
    def needs(self) -> Needs:
        return Needs(rows=True, features=True, batch_size=self.config.batch_size_prompts)

    def start(self, sae: SAEModule, sites: Sites) -> Sums:
        return row_sums(sae)

    def update(self, sums: Sums, seen: Seen) -> None:
        add_rows(sums, seen.numbers, seen.targets, seen.outputs, seen.features, seen.kept)

    def metrics(self, totals: Totals) -> Mapping[str, Any]:
        return row_metrics(totals)

    def counted(self, sums: Sums) -> dict[str, Any]:
        return counted_of_rows(sums)

    def remarks(self, values: Mapping[str, float]) -> tuple[str, ...]:
        worse = values["explained_variance"] < 0
        text = "explained variance is below 0: the SAE is worse than the mean; wrong site, scale or model?"
        return (text,) if worse else ()
