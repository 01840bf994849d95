"""One feature in a notebook: what :func:`saekit.show_feature` returns."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import attrs

from saekit.dashboards.data import Effects, Look
from saekit.dashboards.page import one_html, page_data
from saekit.errors import ConfigError
from saekit.features.feature import Feature
from saekit.features.store import FeatureStore, SAEFeatures
from saekit.plugins.text import printable

__all__ = ["ShownFeature", "shown_feature"]

_LINES = 3  # texts of a feature where there is no page to show
_LEAST_HEIGHT = 200


@attrs.frozen(eq=False, repr=False)
class ShownFeature:
    """A feature as a notebook shows it, and as a text elsewhere.  It is made: nothing is read or computed later."""

    data: Mapping[str, Any]
    """What is shown, as plain data: see :func:`saekit.dashboards.feature_data`."""
    html: str = attrs.field(repr=False)
    """A whole page of it, which asks for nothing from elsewhere."""
    where: str
    """Of what it is a feature."""
    height: int
    """Pixels, at most: what is longer scrolls."""

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its names and styles are no notebook's, nor another cell's."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" data-most="{self.height}" title="Feature {self.data["index"]}" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        found = self.data
        if found["dead"]:
            lines = [f"feature {found['index']} of {self.where}: fires on no token"]
        else:
            often = f"fires on {found['firing_fraction']:.3%} of tokens, at most {found['maximum']:.4g}"
            lines = [f"feature {found['index']} of {self.where}: {often}"]
        if found["label"]:
            lines.append(f"  {found['label']}")
        if found["logits"] is not None:
            lines.append(f"  raises {' '.join(repr(text) for _, text, _ in found['logits']['top'][:8])}")
        for window in found["top"][:_LINES]:
            tokens, at = window["tokens"], window["at"]
            before, token, after = "".join(tokens[:at]), tokens[at], "".join(tokens[at + 1 :])
            text = f"{before}⟦{token}⟧{after}".replace("\n", "⏎")
            lines.append(f"  {window['values'][at]:8.3f}  {text}")
        return printable("\n".join(lines), keep="\n")


def shown_feature(
    store: FeatureStore,
    sae: SAEFeatures,
    feature: Feature,
    look: Look,
    *,
    effects: Effects | None = None,
    label: str | None = None,
    height: int = 800,
) -> ShownFeature:
    """``feature`` of ``sae``, one of ``store``, as it is shown; :class:`ConfigError` for a height in which none is."""
    if type(height) is not int or height < _LEAST_HEIGHT:
        raise ConfigError([("height", f"must be {_LEAST_HEIGHT} pixels or more, found {height!r}")])
    known = {} if effects is None else {sae.name: effects}
    labels = {} if label is None else {sae.name: {feature.index: label}}
    data = page_data(store, {sae.name: [feature]}, look, effects=known, labels=labels)
    where = f"{sae.name}, at {', '.join(sae.about.inputs)} of {store.model_name}"
    page = one_html(data, 0, feature.index, where)
    return ShownFeature(data["saes"][0]["features"][str(feature.index)], page, where, height)
