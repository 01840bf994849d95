"""``saekit.show_feature``: one feature in a notebook."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.commands.dashboards import names_of
from saekit.commands.effects import effects_of
from saekit.commands.stores import named_of, store_of
from saekit.dashboards.effects import check_asked
from saekit.errors import ConfigError
from saekit.plugins.manager import PluginManager, default_manager

if TYPE_CHECKING:
    from saekit.dashboards.notebook import ShownFeature
    from saekit.features.windows import Width

__all__ = ["show_feature"]


def show_feature(
    what: object,
    index: int,
    *,
    sae: str | None = None,
    window: Width = (10, 10),
    top: int = 10,
    quantiles: int = 5,
    per_quantile: int = 3,
    label: str | None = None,
    seed: int = 0,
    loss_effects: str | None = None,
    height: int = 800,
    folder: str | Path | None = None,
    verbose: bool = True,
    plugins: PluginManager | None = None,
    **collecting: Any,
) -> ShownFeature:
    """One feature as a dashboard shows it: as the last value of a cell of a notebook, or as a text where it is printed.

    ``what`` is a feature store, one of its SAEs (``store.saes[NAME]``), or what :func:`saekit.dashboard` takes, and
    everything else is as for that; of a store with several SAEs ``sae`` names one.  What is shown is made now and
    stays in the notebook; it asks for nothing from elsewhere.  A page that is taller than ``height`` pixels scrolls.

    ``loss_effects`` (``"exact"`` or ``"direct"``) tells what removing the feature does to the loss, which needs the SAE
    and its model.  :class:`saekit.errors.ConfigError` for a feature that is not there.
    """
    from saekit.dashboards.data import Look
    from saekit.dashboards.notebook import shown_feature
    from saekit.status import Status

    check_asked(loss_effects)
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise ConfigError([("index", f"must be the number of one feature, found {index!r}; saekit.dashboard(..., "
                            "features=[3, 4]) shows several")])  # fmt: skip
    plugins = plugins or default_manager()
    look = Look(top=top, quantiles=quantiles, per_quantile=per_quantile, window=window, seed=seed)
    sae = named_of(what, sae)
    store = store_of(
        what, folder, collecting, verbose=verbose, plugins=plugins, check=lambda sizes: _check_fits(sizes, sae, index)
    )
    name = _the_one([*store.saes], sae)
    feature = store.saes[name].feature(index, "index")
    with Status(verbose=verbose) as say:
        effects = effects_of(what, store, [name], loss_effects, collecting, plugins, say)
    return shown_feature(store, store.saes[name], feature, look, effects=effects.get(name), label=label, height=height)


def _check_fits(sizes: Mapping[str, int], sae: str | None, index: int) -> None:
    """What SAEs with so many features show of what is asked for, before they are collected."""
    from saekit.features.subject import chosen_features

    name = _the_one([*sizes], sae)
    chosen_features([operator.index(index)], sizes[name], name, "index")


def _the_one(known: Sequence[str], sae: str | None) -> str:
    names = names_of(known, sae)
    if len(names) > 1:
        raise ConfigError([("sae", f"is missing: there are several, {', '.join(names)}; name one")])
    return names[0]
