"""The picture of a sweep, as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.figures import (
    GRAY,
    INK,
    LINE,
    MARGIN,
    RED,
    WIDTH,
    add_axes,
    add_legend,
    new_figure,
    style_axes,
    write,
    write_head,
)
from saekit.reports.frontier import PANELS, Look, has_place, not_drawn, shortened, value_of
from saekit.reports.places import label_points, scale_l0

__all__ = ["frontier_figure"]

_ROW = 3.35
"""Inches of a panel with its title."""
_MOST_ENTRIES = 24
_MARKER_SIZE = 8

Row = Mapping[str, Any]


def frontier_figure(rows: Sequence[Row], options: Mapping[str, str], title: str) -> Any:
    """L0 against explained variance and against CE recovered, a point for each SAE.

    ``rows`` are those of :attr:`saekit.SweepResult.summary`, and ``options`` the columns that were changed, each with
    the name it is shown under.  Points are connected along the option that changes L0 the most, and colored by
    another; what cannot be drawn is named.  None when no row has the numbers.
    """
    panels = [key for key in PANELS if any(has_place(row, key) for row in rows)]
    if not panels:
        return None
    look = Look.of(rows, options)
    handles, notes = list(_legend(look)), not_drawn(rows)
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = 1 if longest > 36 else 2 if longest > 22 else 3
    legend = 0.245 * -(-len(handles) // columns)
    head = 3 * MARGIN + 2 * LINE + legend
    figure = new_figure(WIDTH, head + _ROW * len(panels) + 0.3 + LINE * len(notes))
    write_head(figure, [printable(title), look.caption(len(rows))])
    if handles:
        add_legend(figure, handles, 2 * MARGIN + 2 * LINE, columns)
    for number, key in enumerate(panels):
        axes = add_axes(figure, 0.7, head + _ROW * number + 0.33, WIDTH - 0.7 - 2 * MARGIN, _ROW - 0.75)
        _draw(axes, key, rows, look)
        label_points(axes, [(look.label_of(row), _place(row, key)) for row in rows if has_place(row, key)])
    figure.axes[-1].set_xlabel("L0, features per token", fontsize=10.5, color=GRAY)
    height = figure.get_size_inches()[1]
    for number, note in enumerate(reversed(notes)):
        top = height - LINE * (number + 1)
        write(figure, MARGIN, top, printable(note), fontsize=9.5, color=RED)
    return figure


def _style(look: Look, row: Row) -> dict[str, Any]:
    return {"color": look.color_of(row), "marker": look.marker_of(row)}


def _place(row: Row, key: str) -> tuple[float, float]:
    return row["l0"], row[key]


def _draw(axes: Any, key: str, rows: Sequence[Row], look: Look) -> None:
    """The points of one panel, and the lines between them."""
    style_axes(axes)
    drawn = [row for row in rows if has_place(row, key)]
    for family in look.families(drawn):
        if len(family) > 1:
            xs, ys = zip(*(_place(row, key) for row in family), strict=True)
            axes.plot(xs, ys, color=look.color_of(family[0]), linewidth=1.6, alpha=0.5, zorder=2)
        for row in family:
            axes.plot(
                *_place(row, key), markersize=_MARKER_SIZE, markeredgecolor="white", markeredgewidth=0.8, zorder=3,
                **_style(look, row),
            )  # fmt: skip
    axes.set_title(PANELS[key], fontsize=11, loc="left", color=INK, pad=7)
    axes.margins(0.1)
    scale_l0(axes, [row["l0"] for row in drawn])


def _legend(look: Look) -> Iterator[Any]:
    """An entry for each color and for each shape."""
    from matplotlib.lines import Line2D

    for option, styles, what in (
        (look.color, {value: colors[0] for value, colors in look.colors.items()}, "color"),
        (look.marker, look.markers, "marker"),
    ):
        shown = list(styles.items())
        if len(shown) > _MOST_ENTRIES:  # they are in an order, so a few of them tell
            shown = shown[:: -(-len(shown) // _MOST_ENTRIES)]
        for value, style in shown if option is not None else ():
            looks: dict[str, Any] = {"color": "#808080", "marker": "o", "linestyle": "none", what: style}
            label = printable(f"{look.names[option or '']} = {value_of(value)}")
            yield Line2D([], [], markersize=_MARKER_SIZE, label=shortened(label), markeredgecolor="white", **looks)
