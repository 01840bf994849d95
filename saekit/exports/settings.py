"""What decides what is written for Neuronpedia, beside the store.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from saekit.exports.naming import NeuronpediaName

__all__ = ["SCHEMAS", "Choice", "Credits", "Settings"]

SCHEMAS: Mapping[str, float] = {"saedashboard": -6.0, "sae_lens_3": -5.0, "bulk": -6.0}
"""The schemas, with the logarithm of the firing fraction above which their own runners show a feature."""
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""Whom Neuronpedia's own tools name as the creator where nobody is named."""


@attrs.frozen
class Choice:
    """Which windows."""

    top: int
    quantiles: int
    per_quantile: int
    window: tuple[int, int] | None
    seed: int


@attrs.frozen(kw_only=True)
class Credits:
    """Who made the SAEs, for the rows about the release; each is empty where nobody says it."""

    creator_name: str = ""
    creator_id: str = CREATOR_ID
    release: str = ""
    """The name of the release; left out: that of the set."""
    description: str = ""
    url: str = ""


@attrs.frozen(kw_only=True)
class Settings:
    """What decides what is written, beside the store."""

    schema: str
    name: NeuronpediaName
    features: Sequence[int] | None
    """None: all that the store has."""
    batch_size: int
    min_log_fraction: float | None
    """Features that fire on a smaller fraction, or on the same, are skipped; None: as the schema's own runner."""
    choice: Choice
    credits: Credits

    @property
    def least(self) -> float:
        """The logarithm of the firing fraction above which a feature is shown."""
        return SCHEMAS[self.schema] if self.min_log_fraction is None else self.min_log_fraction
