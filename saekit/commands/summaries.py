"""What a command prints of a table with a row for each feature: a few numbers of each SAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["summary_of"]

_NO_NUMBERS = ["sae", "hook", "feature", "layer", "dead"]


def summary_of(found: DataFrame) -> Iterator[str]:
    """Of each SAE how its columns are distributed, and how many features never fire.

    Columns that cannot be said are no rows.  A feature that never fires has no logarithm of how often it does, so that
    of the others is told.
    """
    import numpy as np

    for (sae, hook), own in found.groupby(["sae", "hook"], observed=True):
        numbers = own.drop(columns=_NO_NUMBERS).replace([np.inf, -np.inf], np.nan).dropna(axis=1, how="all")
        yield f"{sae}  {hook}".rstrip()
        if len(numbers.columns):
            yield (numbers.describe().T.round(4) + 0.0).to_string()  # -0.0 + 0.0 is 0.0
        yield f"{len(own):,} features, {_dead(own)}"


def _dead(own: DataFrame) -> str:
    if own["dead"].isna().all():
        return "unknown how many are dead"
    dead = int(own["dead"].sum())
    return f"{dead:,} dead" + (" (log_feature_sparsity is of the others)" if dead else "")
