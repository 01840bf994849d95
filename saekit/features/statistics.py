"""The table of feature statistics, from a store alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.analysis.feature_statistics import COLUMNS, LOGIT_COLUMNS, table_of
from saekit.errors import ConfigError, DataError
from saekit.features.subject import checksum
from saekit.features.tables import SAETables
from saekit.sae.module import SAEModule

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["fractions_of", "statistics"]


def statistics(sae: SAETables, *, logits: bool = True) -> DataFrame:
    """See :meth:`saekit.features.SAEFeatures.statistics`."""
    about = sae.about
    stored = sae.tables("statistics")
    if missing := set(COLUMNS[-7:-4]) - set(stored) - set(about.left_out):
        raise DataError(f"{sae.store.folder} has no {', '.join(sorted(missing))} of {sae.name}. Collect again")
    columns: dict[str, Tensor | str] = {**about.left_out}
    columns |= {name: torch.from_numpy(values.copy()) for name, values in stored.items()}
    why = sae.why_no_logits if logits else "not asked for"
    for name in LOGIT_COLUMNS:
        known = name.removeprefix("logit_")
        columns[name] = torch.from_numpy(sae.table("logits", known).copy()) if why is None else why
    return table_of(
        columns,
        torch.from_numpy(sae.firing_fraction),
        name=sae.name,
        layer=about.layer,
        hook=about.hook,
        features=sae.indices.tolist(),
    )


def fractions_of(stored: Sequence[SAETables], sae: SAEModule, name: str) -> Tensor:
    """``[d_sae]``: on which fraction of the tokens of a store with the SAEs ``stored`` each feature of ``sae`` fires.

    :class:`ConfigError` for an SAE that is not in the store, by its weights, or not with all its features.
    """
    own = checksum(sae)
    found = next((one for one in stored if one.about.checksum == own), None)
    where, names = repr(str(stored[0].store.folder)), ", ".join(one.name for one in stored)
    if found is None:
        raise ConfigError(
            [("fractions", f"are of a feature store of other SAEs: {where} has {names}, and none with "
              f"the weights of {name}")]
        )  # fmt: skip
    if len(found.indices) < sae.d_sae:
        raise ConfigError(
            [("fractions", f"are of {len(found.indices):,} of the {sae.d_sae:,} features of {name}, which are in "
              f"{where}; collect all of them, or take the statistics of the store itself")]
        )  # fmt: skip
    return torch.from_numpy(found.firing_fraction)
