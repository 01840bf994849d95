"""The picture of a sweep, as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.figures import GRAY, INK, RED, new_figure, plain, style_axes
from saekit.reports.frontier import PANELS, Look, has_place, not_drawn, shortened, value_of

__all__ = ["frontier_figure"]

_OFFSETS = (
    (7, 5), (-7, 5), (7, -5), (-7, -5), (0, 10), (0, -10), (10, 0), (-10, 0), (7, 14), (-7, 14), (7, -14), (-7, -14),
)  # fmt: skip
"""Where a point's label may be, in points of type from it: the first place that is free."""
_HALF = 8.0
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
    columns = 1 if max((len(h.get_label()) for h in handles), default=0) > 34 else 2 if len(handles) < 9 else 3
    legend = 0.24 * -(-len(handles) // columns)
    figure = new_figure(7.2, 3.3 * len(panels) + 0.7 + legend + 0.2 * len(notes))
    height = figure.get_size_inches()[1]
    figure.get_layout_engine().set(rect=(0, 0.2 * len(notes) / height, 1, 1 - (0.58 + 0.2 * len(notes)) / height))
    head = {"va": "top", "ha": "left"}
    plain(
        figure.text(0.016, 1 - 0.08 / height, shortened(printable(title), 58), fontsize=13, fontweight="bold", **head)
    )
    plain(figure.text(0.016, 1 - 0.34 / height, look.caption(len(rows)), fontsize=10.5, color=GRAY, **head))
    for axes, key in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        _draw(axes, key, rows, look)
    figure.axes[-1].set_xlabel("L0, features per token", fontsize=10.5, color=GRAY)
    if handles:
        drawn = figure.legend(
            handles=handles, loc="outside upper left", ncols=columns, fontsize=10.5, frameon=False, labelcolor=INK,
            handletextpad=0.3, columnspacing=1.4,
        )  # fmt: skip
        for text in drawn.get_texts():
            plain(text)
    for number, note in enumerate(reversed(notes)):
        y = (0.07 + 0.2 * number) / height
        plain(figure.text(0.016, y, shortened(printable(note), 96), fontsize=9.5, color=RED)).set_in_layout(False)
    figure.draw_without_rendering()  # the labels' places depend on the layout, and must not change it
    for axes, key in zip(figure.axes, panels, strict=True):
        _label(axes, key, rows, look)
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
    axes.set_title(PANELS[key], fontsize=11.5, loc="left", color=INK, pad=7)
    axes.margins(0.1)
    _scale(axes, [row["l0"] for row in drawn])


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where there is enough of it for one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(xs) >= 3 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 300 * min(xs) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label(axes: Any, key: str, rows: Sequence[Row], look: Look) -> None:
    """Write beside each point what it is, where there is room; where there is none, the line still tells."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    points = [(row, axes.transData.transform(_place(row, key))) for row in rows if has_place(row, key)]
    taken = [Bbox.from_bounds(x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF) for _, (x, y) in points]
    for row, (x, y) in points:
        for dx, dy in _OFFSETS:
            text = axes.annotate(
                printable(look.label_of(row)), _place(row, key), xytext=(dx, dy), textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[(dx > 0) - (dx < 0)], va="center", color=INK, zorder=4,
                fontsize=9.5, path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            plain(text).set_in_layout(False)
            box = text.get_window_extent()
            own = Bbox.from_bounds(x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF).bounds
            if _inside(box, axes.bbox) and not any(box.overlaps(other) for other in taken if other.bounds != own):
                taken.append(box)
                break
            text.remove()


def _inside(box: Any, outer: Any) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)


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
