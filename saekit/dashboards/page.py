"""A dashboard: one HTML file with all that it shows, which opens from disk and needs no network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from saekit._version import __version__
from saekit.dashboards.data import Effects, Look, feature_data, index_data, sae_data
from saekit.dashboards.place import GENERATOR
from saekit.features.feature import Feature
from saekit.features.store import FeatureStore

__all__ = ["as_json", "one_html", "page_data", "page_html", "plotly_gzipped", "plotly_packed"]

_SCRIPTS = ("tokens.js", "source.js", "tips.js", "plots.js", "feature.js", "list.js", "page.js")
_SCRIPTS_OF_ONE = ("tokens.js", "source.js", "tips.js", "bars.js", "feature.js", "one.js")
_SERVED = "served.js"  # comes first


def page_data(
    store: FeatureStore,
    features: Mapping[str, Sequence[Feature]],
    look: Look | None = None,
    *,
    effects: Mapping[str, Effects] | None = None,
    labels: Mapping[str, Mapping[int, str]] | None = None,
    embedded: bool = True,
    title: str | None = None,
) -> dict[str, Any]:
    """What a page of ``features``, by the names of their SAEs, holds.

    ``title``, ``model``, ``dataset``, ``n_contexts``, ``context_size``, ``version``, and ``saes``: of each,
    ``about`` (:func:`sae_data`), ``index`` (:func:`index_data`) and ``features``: :func:`feature_data` by number, of
    all (``embedded``) or of none.  A page asks for what it has not at ``sae/PLACE/feature/NUMBER.json``, where
    ``PLACE`` counts the SAEs of ``saes`` from 0.
    """
    look = look or Look()
    manifest = store.manifest
    found = []
    for name, chosen in features.items():
        own, known = (labels or {}).get(name, {}), (effects or {}).get(name)
        shown = {
            str(one.index): feature_data(one, look, effects=known, label=own.get(one.index))
            for one in (chosen if embedded else ())
        }
        sae = store.saes[name]
        found.append({"about": sae_data(sae), "index": index_data(sae, chosen, own), "features": shown})
    return {
        "title": title or f"Features of {', '.join(features)}",
        "model": store.model_name,
        "dataset": manifest.dataset.get("dataset"),
        "n_contexts": store.n_contexts,
        "context_size": store.context_size,
        "version": __version__,
        "saes": found,
    }


def page_html(data: Mapping[str, Any], *, plotly_at: str | None = None) -> str:
    """The page of what :func:`page_data` gives.

    ``plotly_at`` is the path of plotly.js for a page that is served; without it the page has all in itself.
    """
    scripts = _SCRIPTS if plotly_at is None else (_SERVED, *_SCRIPTS)
    plotly = plotly_packed() if plotly_at is None else ""
    return _rendered("page.html", data, ("page.css",), scripts, plotly=plotly, plotly_at=plotly_at)


def one_html(data: Mapping[str, Any], place: int, index: int, where: str) -> str:
    """A small page of one feature, of the SAE at ``place``, whose pictures need no plotly; ``where`` is its first line.

    ``data`` is what :func:`page_data` gives, in which it must be.
    """
    sae = data["saes"][place]
    found = {"about": sae["about"], "index": [], "features": {str(index): sae["features"][str(index)]}, "shown": index}
    return _rendered("one.html", {**data, "saes": [found]}, ("page.css", "one.css"), _SCRIPTS_OF_ONE, where=where)


def _rendered(
    template: str, data: Mapping[str, Any], styles: Sequence[str], scripts: Sequence[str], **others: Any
) -> str:
    from jinja2 import Environment

    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(_resource(template))
        .render(
            title=data["title"],
            generator=GENERATOR,
            version=__version__,
            css="\n".join(map(_resource, styles)),
            js="\n".join(map(_resource, scripts)),
            data=as_json(data),
            **others,
        )
    )


def as_json(data: Any) -> str:
    """As a script may hold it: nothing in it can end the script."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_gzipped() -> bytes:
    """plotly.js, 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs

    return gzip.compress(get_plotlyjs().encode(), 9, mtime=0)


@cache
def plotly_packed() -> str:
    """The same as base64, which the page unpacks when it draws its first picture."""
    return base64.b64encode(plotly_gzipped()).decode()


def _resource(name: str) -> str:
    return (files(__package__) / "web" / name).read_text(encoding="utf-8")
