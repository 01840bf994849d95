"""Pictures of token set enrichment, by plotly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saekit.reports.colors import PALETTE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from saekit.analysis.tsea import Enrichment

__all__ = ["LABELED_ABOVE", "corners", "labeled", "manhattan", "overlay", "places_of"]

LABELED, LABELED_ABOVE = 3, 1.0
"""So many features of each set are named, where ``−ln(1 − score)`` is above that: a score of 0.63."""
_MOST_POINTS = 6000
"""More are drawn as one picture, by the graphics processor."""
_MOST_CORNERS = 800


def places_of(found: Enrichment) -> NDArray[np.float64]:
    """``[sets, features]``: where each feature stands on the axis; each set has the width 1."""
    n = len(found.features)
    within = (np.arange(n) + 0.5) / n * 0.84 + 0.08
    return np.arange(len(found.sets))[:, None] + within[None]


def labeled(found: Enrichment) -> list[tuple[int, int]]:
    """Set and feature, as places, of those that are named: the :data:`LABELED` highest of each set."""
    heights = np.nan_to_num(found.heights(), nan=-1.0)
    return [
        (row, int(column))
        for row, own in enumerate(heights)
        for column in np.argsort(-own, kind="stable")[:LABELED]
        if own[column] > LABELED_ABOVE
    ]


def manhattan(found: Enrichment) -> Figure:
    """Each set is a stripe, each feature of it a point, the higher the more the set is enriched: ``−ln(1 − score)``.

    Color and shape tell whether the feature promotes the set or suppresses it.
    """
    from plotly.graph_objects import Figure, Scatter, Scattergl

    kind = Scatter if found.values.signed.size <= _MOST_POINTS else Scattergl
    figure = Figure()
    x, y, names = places_of(found), found.heights(), [*found.sets]
    signs = (("promotes", 1, 0, "triangle-up"), ("suppresses", -1, 1, "triangle-down"))
    for sign, direction, color, symbol in signs:
        rows, columns = np.nonzero(found.values.signed * direction > 0)
        p = None if found.p is None else found.p[rows, columns]
        told = [
            f"<b>{_safe(names[row])}</b><br>feature {found.features[column]} {sign} it<br>"
            f"score {found.values.unsigned[row, column]:.3f}" + ("" if p is None else f", p = {p[place]:.2g}")
            for place, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
        light, dark = PALETTE[color]
        figure.add_trace(
            kind(
                x=x[rows, columns].round(4), y=y[rows, columns].round(4), mode="markers", name=sign, hovertext=told,
                marker={"size": 6, "symbol": symbol, "color": light, "opacity": 0.75}, hoverinfo="text",
                meta={"light": light, "dark": dark},
            )
        )  # fmt: skip
    for row, column in labeled(found):
        figure.add_annotation(
            x=x[row, column], y=y[row, column], text=str(found.features[column]), showarrow=False, yshift=10,
            font={"size": 10}, name="feature",
        )  # fmt: skip
    for row in range(0, len(names), 2):
        figure.add_vrect(x0=row, x1=row + 1, fillcolor="#808080", opacity=0.07, line_width=0, layer="below")
    figure.update_xaxes(
        tickvals=[row + 0.5 for row in range(len(names))], ticktext=[_safe(name) for name in names], tickangle=-60,
        range=[0, len(names)], showgrid=False, zeroline=False,
    )  # fmt: skip
    top = float(np.nanmax(y)) if np.isfinite(y).any() else 1.0
    figure.update_yaxes(title="−ln(1 − score)", range=[0, max(top * 1.12, 0.2)], zeroline=False)
    _dress(figure)
    return figure


def overlay(found: Enrichment, feature: int, sets: Sequence[str] | int = 5) -> Figure:
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
