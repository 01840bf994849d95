"""Pictures of token set enrichment, by plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saekit.reports.colors import PALETTE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from saekit.analysis.scored import Scored

__all__ = [
    "LABELED_ABOVE",
    "UNLIKELY",
    "corners",
    "drawn_of_each",
    "labeled",
    "lifts",
    "manhattan",
    "overlay",
    "places_of",
]

LABELED, LABELED_ABOVE = 3, 1.0
"""So many features of each set are named, where ``−ln(1 − score)`` is above that: a score of 0.63."""
UNLIKELY = 0.05
"""What chance gives more often than that is drawn pale."""
_HEIGHT, _WIDTH, _LINE = 300, 1000, 12
"""Pixels: about so many has the picture, and the height of a label."""
_MOST_POINTS = 6000
"""Of more, the highest of each set are drawn."""
_MOST_CORNERS = 800


def places_of(found: Scored) -> NDArray[np.float64]:
    """``[sets, features]``: where each feature stands on the axis; each set has the width 1."""
    n = len(found.features)
    within = (np.arange(n) + 0.5) / n * 0.84 + 0.08
    return np.arange(len(found.sets))[:, None] + within[None]


def labeled(found: Scored) -> list[tuple[int, int]]:
    """Set and feature, as places, of those that are named: the :data:`LABELED` highest of each set."""
    heights = np.nan_to_num(found.heights(), nan=-1.0)
    return [
        (row, int(column))
        for row, own in enumerate(heights)
        for column in np.argsort(-own, kind="stable")[:LABELED]
        if own[column] > LABELED_ABOVE
    ]


def drawn_of_each(found: Scored) -> int:
    """How many features of each set are drawn, the highest: all, unless that were very many points."""
    return min(len(found.features), max(_MOST_POINTS // len(found.sets), LABELED))


def _highest(found: Scored) -> NDArray[np.bool_]:
    """``[sets, features]``: those."""
    heights = np.nan_to_num(found.heights(), nan=-1.0)
    chosen = np.zeros(heights.shape, dtype=bool)
    order = np.argsort(-heights, axis=1, kind="stable")[:, : drawn_of_each(found)]
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def lifts(found: Scored, top: float) -> list[int]:
    """By how many pixels each label is above its point, so that no two are over each other.

    The picture is taken to be :data:`_WIDTH` pixels wide; the page puts them anew where it is not.
    """
    heights, x, chosen = found.heights(), places_of(found) * _WIDTH / len(found.sets), labeled(found)
    found_lifts, taken = dict[tuple[int, int], int](), list[tuple[float, float, float]]()
    for row, column in sorted(chosen, key=lambda one: (heights[one], one)):  # the lowest first
        at, half = heights[row, column] / top * _HEIGHT, _half(found.features[column])
        place = at + 10
        for bottom in sorted(y for other, y, width in taken if abs(other - x[row, column]) < half + width):
            if abs(bottom - place) < _LINE:
                place = bottom + _LINE
        found_lifts[row, column] = round(place - at)
        taken.append((x[row, column], place, half))
    return [found_lifts[one] for one in chosen]


def _half(feature: int) -> float:
    """Pixels: half of what the label is wide, with some room."""
    return 3 * len(str(feature)) + 2


def manhattan(found: Scored) -> Figure:
    """Each set is a stripe, each feature of it a point, the higher the more the set is enriched: ``−ln(1 − score)``.

    Color and shape tell whether the feature promotes the set or suppresses it; a score that chance gives often is pale.
    """
    from plotly.graph_objects import Figure, Scatter

    figure, shown = Figure(), _highest(found)
    x, y, names = places_of(found), found.heights(), [*found.sets]
    signs = (("promotes", 1, 0, "triangle-up"), ("suppresses", -1, 1, "triangle-down"))
    for sign, direction, color, symbol in signs:
        rows, columns = np.nonzero((found.values.signed * direction > 0) & shown)
        if found.p is not None:  # what is clear is drawn last, on top, but for the one that the legend shows
            order = np.roll(np.argsort(found.p[rows, columns] <= UNLIKELY, kind="stable"), 1)
            rows, columns = rows[order], columns[order]
        p = None if found.p is None else found.p[rows, columns]
        told = [
            f"<b>{_safe(names[row])}</b><br>feature {found.features[column]} {sign} it<br>"
            f"score {found.values.unsigned[row, column]:.3f}" + ("" if p is None else f", p = {p[place]:.2g}")
            for place, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
        clear = np.full(len(rows), 0.8) if p is None else np.where(p > UNLIKELY, 0.25, 0.8)
        light, dark = PALETTE[color]
        figure.add_trace(
            Scatter(
                x=x[rows, columns].round(4), y=y[rows, columns].round(4), mode="markers", name=sign, hovertext=told,
                marker={"size": 6, "symbol": symbol, "color": light, "opacity": clear}, hoverinfo="text",
                meta={"light": light, "dark": dark},
            )
        )  # fmt: skip
    top = float(np.nanmax(y)) if np.isfinite(y).any() else 1.0
    top = max(top * 1.12, 0.2)
    tall = [y[one] / top * _HEIGHT + lift for one, lift in zip(labeled(found), lifts(found, top), strict=True)]
    top *= max([1.0, *((pixels + _LINE) / _HEIGHT for pixels in tall)])  # the highest label is in the picture, too
    for (row, column), lift in zip(labeled(found), lifts(found, top), strict=True):
        figure.add_annotation(
            x=x[row, column], y=y[row, column], text=str(found.features[column]), showarrow=False, yshift=lift,
            font={"size": 10}, name="feature",
        )  # fmt: skip
    for row in range(0, len(names), 2):
        figure.add_vrect(x0=row, x1=row + 1, fillcolor="#808080", opacity=0.07, line_width=0, layer="below")
    figure.update_xaxes(
        tickvals=[row + 0.5 for row in range(len(names))], ticktext=[_safe(name) for name in names], tickangle=-60,
        range=[0, len(names)], showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    figure.update_yaxes(title="−ln(1 − score)", range=[0, top], zeroline=False)
    _dress(figure)
    return figure


def overlay(found: Scored, feature: int, sets: Sequence[str] | int = 5) -> Figure:
    """The running sums of several sets in one feature, over the tokens in its order, those that it promotes first."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for number, (name, (passed, sums)) in enumerate(found.running_sums(feature, sets).items()):
        light, dark = PALETTE[number % len(PALETTE)]
        at, height = corners(passed, sums)
        score = found.values.signed[[*found.sets].index(name), found.features.index(feature)]
        figure.add_trace(
            Scatter(
                x=at, y=height.round(4), mode="lines", name=f"{_safe(name)} {score:+.2f}",
                line={"color": light, "width": 1.8}, meta={"light": light, "dark": dark},
                hovertemplate="%{y:.3f} after %{x:,} tokens",
            )
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": "#808080", "width": 1})
    figure.update_xaxes(title="tokens, those with the highest logits first", range=[0, found.d_vocab], zeroline=False)
    figure.update_yaxes(title="running sum", zeroline=False)
    figure.update_layout(title={"text": f"feature {feature}", "font": {"size": 14}})
    _dress(figure)
    return figure


def corners(passed: NDArray[np.int64], sums: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most about :data:`_MOST_CORNERS` of a line's corners; where it is highest and where lowest are among them."""
    if len(passed) <= _MOST_CORNERS:
        return passed, sums
    some = np.linspace(0, len(passed) - 1, _MOST_CORNERS).astype(int)
    kept = np.unique(np.concatenate([some, [int(sums.argmax()), int(sums.argmin())]]))
    return passed[kept], sums[kept]


def _safe(text: str) -> str:
    """Plotly reads some tags in texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _dress(figure: Any) -> None:
    figure.update_layout(
        template="plotly_white", margin={"l": 56, "r": 14, "t": 36, "b": 96}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )  # fmt: skip
