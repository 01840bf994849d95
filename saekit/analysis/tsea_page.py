"""Token set enrichment as a page and as tables."""

from __future__ import annotations

import json
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit._version import __version__
from saekit.analysis.tsea_figures import LABELED_ABOVE, UNLIKELY, drawn_of_each, labeled, manhattan, overlay
from saekit.errors import PlaceError
from saekit.files.paths import as_path
from saekit.files.storage import write_bytes

if TYPE_CHECKING:
    from saekit.analysis.scored import Scored

__all__ = ["FILES", "page", "write"]

FILES = ("tsea.csv", "tsea.parquet", "tsea.html")
_OVERLAYS, _ROWS = 8, 60


def write(found: Scored, folder: str | Path) -> tuple[Path, ...]:
    """The files; each is there whole or not at all.  :class:`PlaceError` for a folder that cannot be made."""
    place = as_path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"cannot write token set enrichment into {str(place)!r}: {error.strerror or error}") from error
    table, packed = found.table(), BytesIO()
    table.to_parquet(packed, index=False)
    contents = (table.to_csv(index=False).encode(), packed.getvalue(), page(found).encode())
    paths = tuple(place / name for name in FILES)
    for path, data in zip(paths, contents, strict=True):
        write_bytes(path, data)
    return paths


def page(found: Scored) -> str:
    """One HTML file with plotly in it, which needs no network and nothing beside it."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    here, reports = files("saekit.analysis"), files("saekit.reports")
    template = Environment(autoescape=True).from_string(here.joinpath("tsea.html").read_text(encoding="utf-8"))
    figures = [manhattan(found), *(overlay(found, feature) for feature in found.strongest(_OVERLAYS))]
    return template.render(
        found=found,
        about=_about(found),
        rules=_rules(found),
        rows=_rows(found),
        left_out=dict(found.left_out),
        above=LABELED_ABOVE,
        version=__version__,
        css=reports.joinpath("page.css").read_text(encoding="utf-8"),
        js=here.joinpath("tsea.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        figures=[_json(figure) for figure in figures],
    )


def _json(figure: Any) -> str:
    """As a script may hold it; plotly would write arrays as base64, which the page's own script cannot turn."""
    plain = json.dumps(_plain(figure.to_dict()), allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key != "template"}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _about(found: Scored) -> str:
    asked = found.about
    how = {
        "skewed": "those whose logits are skewed most to the right", "random": "drawn at random among those that fire",
        "all": "all of them",
    }.get(str(asked.get("features")), "chosen by number")  # fmt: skip
    parts = [f"{len(found.features):,} features ({how})", f"{len(found.sets):,} sets", f"{found.d_vocab:,} tokens"]
    parts += [f"{name} {asked[name]}" for name in ("model", "site") if name in asked]
    return " · ".join(parts)


def _rules(found: Scored) -> list[str]:
    rules = [
        "For each feature the tokens are put in order, those that it raises most first. The score of a set is the "
        "largest distance from 0 that the running sum comes to, up at each token of the set and down at each other; "
        "above 0 the feature promotes the set, below it suppresses it. Points are drawn at −ln(1 − score)."
    ]
    if (most := drawn_of_each(found)) < len(found.features):
        rules.append(
            f"Of each set the {most:,} highest points are drawn, of {len(found.features):,}; the tables have all."
        )
    if found.p is not None:
        compared = int((~np.isnan(found.p)).sum())
        rules.append(
            f"p: how often tokens in a random order give such a score, of {found.permutations:,} orders; it is never "
            f"below {1 / (1 + found.permutations):.2g}, and points with p > {UNLIKELY} are pale. "
            f"{compared:,} comparisons are made here, so some small p are chance: q is the share of false findings "
            "among those with a p no larger (Benjamini and Hochberg 1995)."
        )
        if (least := found.at_the_floor()) is not None:
            rules.append(f"{least} They may be smaller in truth: more orders (permutations) tell them apart.")
    return rules


def _rows(found: Scored) -> list[dict[str, Any]]:
    """The named points, the least likely first; of those alike, and without ``p``, the highest."""
    from saekit.analysis.scored import q_values

    names, values = [*found.sets], found.values
    q = None if found.p is None else q_values(found.p)
    least = np.zeros(values.unsigned.shape) if found.p is None else found.p
    chosen = sorted(labeled(found), key=lambda place: (least[place], -values.unsigned[place]))[:_ROWS]
    return [
        {
            "set": names[row],
            "size": len(found.sets[names[row]]),
            "feature": found.features[column],
            "score": f"{values.signed[row, column]:+.3f}",
            "p": "" if found.p is None else f"{found.p[row, column]:.2g}",
            "q": "" if q is None else f"{q[row, column]:.2g}",
        }
        for row, column in chosen
    ]
