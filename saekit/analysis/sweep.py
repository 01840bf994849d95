"""A picture of a sweep: sparsity against fidelity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

__all__ = ["plot_sweep"]

_PANELS = {"explained_variance": "Explained variance", "ce_recovered": "CE recovered"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#4d4d4d")  # Okabe and Ito
_MARKERS = "os^Dv<>pPX"
_OFFSETS = (
    (6, 4),
    (-6, 4),
    (6, -4),
    (-6, -4),
    (0, 8),
    (0, -8),
    (9, 0),
    (-9, 0),
    (6, 11),
    (-6, 11),
    (6, -11),
    (-6, -11),
)
_MOST_ENTRIES = 24


def plot_sweep(rows: Sequence[Mapping[str, Any]], options: Mapping[str, str], to: Path) -> Path | None:
    """L0 against explained variance and against CE recovered, a point for each SAE, as a PNG at ``to``.

    ``rows`` are those of :attr:`saekit.SweepResult.summary`, and ``options`` the columns that were changed, each with
    the name it is shown under.  Points are connected along the option that changes L0 the most, and colored by
    another; what cannot be drawn is named.  None when no row has the numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [key for key in _PANELS if any(_point(row, key) for row in rows)]
    if not panels:
        return None
    drawn = [row for row in rows if any(_point(row, key) for key in panels)]
    look = _Look.of(drawn, rows, options)
    figure = Figure(
        figsize=(5.2 * len(panels) + 1.4, 4.6), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    FigureCanvasAgg(figure)
    figure.suptitle(look.caption(len(rows)), fontsize=9, x=0.012, ha="left")
    every_axes = figure.subplots(1, len(panels), squeeze=False).flat
    for axes, key in zip(every_axes, panels, strict=True):
        _draw(axes, key, rows, look)
    if handles := list(_legend(look)):
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    if note := _note([row for row in rows if row not in drawn]):
        figure.supxlabel(note, fontsize=8, color="#a40000", x=0.012, ha="left")
    figure.draw_without_rendering()  # the labels' places depend on the layout, and must not change it
    for axes, key in zip(figure.axes, panels, strict=True):
        _label(axes, key, rows, look)
    figure.savefig(to)
    return to


@attrs.frozen
class _Look:
    """Which changed option is shown how."""

    names: Mapping[str, str]
    along: str | None
    """Its values label the points, and lines connect them."""
    colors: Mapping[Any, str]
    color: str | None
    markers: Mapping[Any, str]
    marker: str | None

    @classmethod
    def of(
        cls, drawn: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]
    ) -> _Look:
        spreads = {option: _spread(drawn, option, names) for option in names if _numeric(drawn, option)}
        along = max(spreads, key=lambda option: spreads[option], default=None)
        if along is not None and not spreads[along]:
            along = None
        others = sorted((o for o in names if o != along), key=lambda option: -len(_values(rows, option)))
        color, marker, *_ = [*others, None, None]
        if marker is not None and len(_values(rows, marker)) > len(_MARKERS):
            marker = None
        return cls(
            names,
            along,
            _palette(_values(rows, color), _numeric(rows, color)) if color else {},
            color,
            dict(zip(_values(rows, marker), _MARKERS, strict=False)) if marker else {},
            marker,
        )

    def style(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """How the point of ``row`` looks."""
        return {
            "color": self.colors[_key(row[self.color])] if self.color else _COLORS[0],
            "marker": self.markers[_key(row[self.marker])] if self.marker else "o",
        }

    def label(self, row: Mapping[str, Any]) -> str:
        if self.along is not None:
            return _text(row[self.along])
        return _short_name(str(row["name"])) if self.by_name else ""

    @property
    def by_name(self) -> bool:
        """Whether nothing else tells the SAEs apart."""
        return self.along is None and (not self.names or not set(self.names) <= {self.color, self.marker})

    def caption(self, number: int) -> str:
        parts = [f"{number} SAE{'s' if number > 1 else ''}"]
        if self.along is not None:
            parts.append(f"numbers at the points and lines: {self.names[self.along]}")
        elif self.by_name:
            parts.append("at the points: names")
        shown = (("colors", self.color), ("shapes", self.marker))
        parts += [f"{what}: {self.names[option]}" for what, option in shown if option]
        return "    ".join(parts)

    def line_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """The same for points on one line."""
        return tuple(_key(row[option]) for option in self.names if option != self.along)


def _draw(axes: Any, key: str, rows: Sequence[Mapping[str, Any]], look: _Look) -> None:
    """The points of one panel, and the lines between them."""
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if _point(row, key):
            lines.setdefault(look.line_of(row), []).append(row)
    for line in lines.values():
        if (along := look.along) is not None:
            ordered = sorted(line, key=lambda row: row[along])
            xs, ys = zip(*(_drawn(row, key) for row in ordered), strict=True)
            axes.plot(xs, ys, color=look.style(line[0])["color"], linewidth=1.2, alpha=0.45, zorder=1)
        for row in line:
            axes.plot(*_drawn(row, key), markersize=6, markeredgecolor="white", markeredgewidth=0.6, **look.style(row))
    axes.set_title(f"{_PANELS[key]} against L0", fontsize=10, loc="left")
    axes.set_xlabel("L0: features firing per token", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(0.09)
    _scale(axes, [_drawn(row, key)[0] for line in lines.values() for row in line])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where there is enough of it for one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(xs) >= 3 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 300 * min(xs) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label(axes: Any, key: str, rows: Sequence[Mapping[str, Any]], look: _Look) -> None:
    """Write beside each point what it is, where there is room; where there is none, the line still tells."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    points = [(row, axes.transData.transform(_drawn(row, key))) for row in rows if _point(row, key)]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for _, (x, y) in points]
    for row, (x, y) in points:
        for dx, dy in _OFFSETS:
            text = axes.annotate(
                look.label(row), _drawn(row, key), xytext=(dx, dy), textcoords="offset points", fontsize=7.5,
                ha={1: "left", 0: "center", -1: "right"}[(dx > 0) - (dx < 0)], va="center",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent()
            own = Bbox.from_bounds(x - 5, y - 5, 10, 10).bounds
            if _inside(box, axes.bbox) and not any(box.overlaps(other) for other in taken if other.bounds != own):
                taken.append(box)
                break
            text.remove()


def _inside(box: Any, outer: Any) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)


def _legend(look: _Look) -> Iterator[Any]:
    """An entry for each color and for each shape."""
    from matplotlib.lines import Line2D

    for option, styles, what in ((look.color, look.colors, "color"), (look.marker, look.markers, "marker")):
        shown = list(styles.items())
        if len(shown) > _MOST_ENTRIES:  # they are in an order, so a few of them tell
            shown = shown[:: -(-len(shown) // _MOST_ENTRIES)]
        for value, style in shown if option is not None else ():
            looks: dict[str, Any] = {"color": "#808080", "marker": "o", "linestyle": "none", what: style}
            label = f"{look.names[option or '']} = {_text(value)}"
            yield Line2D([], [], markersize=6, label=_shortened(label), **looks)


def _note(left: Sequence[Mapping[str, Any]]) -> str:
    """Which SAEs are not in the picture, and why."""
    reasons = {
        "diverged": [str(row["name"]) for row in left if row["status"] == "diverged"],
        "without a feature that fires, or without numbers": [
            str(row["name"]) for row in left if row["status"] != "diverged"
        ],
    }
    lines = []
    for reason, names in reasons.items():
        shown = [_shortened(name, 60) for name in names[:3]]
        more = [f"{len(names) - 3} more"] if len(names) > 3 else []
        if names:
            lines.append(f"Not drawn, {reason}: {', '.join([*shown, *more])}")
    return "\n".join(lines)


def _palette(values: Sequence[Any], numeric: bool) -> dict[Any, str]:
    """A color for each value: from dark to light for numbers, as different as can be for others."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if len(values) <= 2 or (not numeric and len(values) <= len(_COLORS)):
        return dict(zip(values, _COLORS, strict=False))
    shades = colormaps["viridis" if numeric else "turbo"]
    return {value: to_hex(shades(0.9 * index / (len(values) - 1))) for index, value in enumerate(values)}


def _spread(rows: Sequence[Mapping[str, Any]], option: str, options: Mapping[str, str]) -> float:
    """By how much L0 changes along ``option``, where all others are the same: the mean range of its logarithm."""
    lines: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        lines.setdefault(tuple(_key(row[o]) for o in options if o != option), []).append(math.log(row["l0"]))
    ranges = [max(line) - min(line) for line in lines.values() if len(line) > 1]
    return sum(ranges) / len(ranges) if ranges else 0.0


def _values(rows: Sequence[Mapping[str, Any]], option: str) -> list[Any]:
    """The distinct values of ``option``; numbers in their order, others in that of the rows."""
    values = list(dict.fromkeys(_key(row[option]) for row in rows))
    return sorted(values) if _numeric(rows, option) else values


def _numeric(rows: Sequence[Mapping[str, Any]], option: str | None) -> bool:
    return option is not None and all(
        isinstance(row[option], (int, float)) and not isinstance(row[option], bool) for row in rows
    )


def _key(value: Any) -> Any:
    """``value``, or its text where it is a list or the like."""
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _text(value: Any) -> str:
    return f"{value:,.10g}" if isinstance(value, float) else str(value)


def _short_name(name: str) -> str:
    """Of a name that is made of the options, the number."""
    number, _, rest = name.partition("_")
    return number if number.isdecimal() and "=" in rest else _shortened(name, 24)


def _shortened(text: str, most: int = 38) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _point(row: Mapping[str, Any], key: str) -> bool:
    """Whether ``row`` has a place in the panel of ``key``."""
    l0, value = row["l0"], row[key]
    return bool(l0) and value is not None and math.isfinite(l0) and math.isfinite(value)


def _drawn(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    return row["l0"], row[key]
