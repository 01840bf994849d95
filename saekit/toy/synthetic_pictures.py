"""What `saekit bench-synthetic` found, as a picture and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.colors import colors_of
from saekit.reports.figures import (
    GRAY,
    INK,
    LINE,
    MARGIN,
    WIDTH,
    add_axes,
    add_legend,
    as_png,
    new_figure,
    style_axes,
    styled,
    write_head,
)
from saekit.reports.page import whole_page
from saekit.toy.synthetic import AXES, MEASURES, averaged, short_names, told_problem

__all__ = ["synthetic_page", "synthetic_png"]

_DRAWN = ("mmcs", "precision", "recall")
_MARKERS = "osD^v<>p"
_TITLE = "Known features, found by SAEs"
_ROW, _COLUMN, _LEFT = 1.95, 2.2, 0.55

Row = Mapping[str, Any]


def synthetic_png(rows: Sequence[Row]) -> bytes:
    """MMCS, precision and recall over each axis, a line for each architecture, as a PNG file."""
    from matplotlib.lines import Line2D

    series, colors, names = _series(rows), _colors(rows), short_names(rows)
    axes_there = [axis for axis in AXES if any(axis == one for one, _, _ in series)]
    handles = [
        Line2D([], [], color=colors[name][0], marker=_marker(rows, name), markersize=5, label=printable(names[name]))
        for name in colors
    ]
    with styled():
        legend = 0.245 * -(-len(handles) // 4)
        head = 3 * MARGIN + 2 * LINE + legend
        figure = new_figure(WIDTH, head + (_ROW + 0.12) * len(_DRAWN) + 0.45)
        write_head(figure, [_TITLE, _caption(rows)])
        add_legend(figure, handles, 2 * MARGIN + 2 * LINE, 4)
        for across, axis in enumerate(axes_there):
            for down, measure in enumerate(_DRAWN):
                axes = add_axes(
                    figure, _LEFT + _COLUMN * across, head + 0.25 + (_ROW + 0.12) * down, _COLUMN - 0.3, _ROW - 0.45
                )
                style_axes(axes)
                axes.set_ylim(0, 1.04)
                axes.tick_params(labelleft=not across)
                axes.set_title(MEASURES[measure], fontsize=10.5, loc="left", color=INK, pad=4)
                for (of, name, xs), points in series.items():
                    if of == axis:
                        axes.plot(
                            range(len(xs)), [row[measure] for row in points], color=colors[name][0], linewidth=1.5,
                            marker=_marker(rows, name), markersize=4.5, markeredgecolor="white", markeredgewidth=0.5,
                        )  # fmt: skip
                        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
                if down == len(_DRAWN) - 1:
                    axes.set_xlabel(_axis_words(axis), fontsize=9.5, color=GRAY)
        return as_png(figure)


def synthetic_page(rows: Sequence[Row]) -> str:
    """The same as a page that answers the mouse, for light and dark screens, with all numbers in a table."""
    series, colors, names = _series(rows), _colors(rows), short_names(rows)
    groups = []
    for measure in _DRAWN:
        charts = []
        for axis, words in AXES.items():
            lines = [
                {
                    "name": printable(name), "look": "points", "marker": _marker(rows, name),
                    **_both(colors[name]), "tags": [name], "x": list(xs),
                    "y": [round(row[measure], 5) for row in points],
                    "labels": ["" for _ in xs], "hover": [_hover(row, names) for row in points],
                }
                for (of, name, xs), points in series.items() if of == axis
            ]  # fmt: skip
            if lines:
                charts.append({
                    "title": f"{MEASURES[measure]} · {words[0].lower()}{words[1:]}", "log": False, "xlog": False,
                    "lower": 0.0, "upper": 1.0, "note": "", "format": "fraction", "lines": lines,
                })  # fmt: skip
        groups.append({"kind": "points", "charts": charts})
    entries = [
        {"name": printable(names[name]), "look": "points", "tag": name, "marker": _marker(rows, name),
         **_both(shade)}
        for name, shade in colors.items()
    ]  # fmt: skip
    data = {
        "tiles": [], "marks": [], "legend": [{"what": "architecture", "entries": entries}] if entries else [],
        "groups": groups, "table": _table(rows),
    }  # fmt: skip
    return whole_page(
        _TITLE, [("sub", _caption(rows)), *_notes(rows)], data, "Made by saekit {version} from synthetic.json."
    )


def _series(rows: Sequence[Row]) -> dict[tuple[str, str, tuple[float, ...]], list[Row]]:
    """By axis, architecture and the values of the axis, the rows at these; an axis of one value is left out."""
    means = list(averaged(row for row in rows if "problem" not in row))
    found: dict[tuple[str, str, tuple[float, ...]], list[Row]] = {}
    for axis in AXES:
        for name in dict.fromkeys(row["architecture"] for row in means):
            of_it = [row for row in means if row["architecture"] == name and axis in row["axes"]]
            points: list[Row] = sorted(of_it, key=lambda row: float(row["setting"][axis]))
            if len(points) > 1:
                found[axis, name, tuple(row["setting"][axis] for row in points)] = points
    return found


def _colors(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    return {str(name): shades for name, shades in colors_of(names).items()}


def _marker(rows: Sequence[Row], name: str) -> str:
    number = list(dict.fromkeys(row["architecture"] for row in rows)).index(name)
    return _MARKERS[number % len(_MARKERS)]


def _axis_words(axis: str) -> str:
    return {"l0": "true L0", "correlated": "share in correlated pairs", "superposition": "features per dimension"}[axis]


def _caption(rows: Sequence[Row]) -> str:
    seeds, widths = len({row["seed"] for row in rows}), {row["setting"]["n_hidden"] for row in rows}
    return f"{', '.join(map(str, sorted(widths)))} dimensions · {seeds} seed{'s' * (seeds != 1)}"


def _notes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    for row in rows:
        if "problem" in row:
            yield "end", told_problem(row)


def _both(shades: tuple[str, str]) -> dict[str, str]:
    return {"light": shades[0], "dark": shades[1]}


def _hover(row: Row, names: Mapping[str, str]) -> str:
    told = ", ".join(f"{words} {row[name]:.3f}" for name, words in MEASURES.items())
    return printable(f"{names[row['architecture']]}\n{told}", keep="\n")


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    lines, names = [], short_names(rows)
    for row in averaged(row for row in rows if "problem" not in row):
        values = [row["setting"][axis] for axis in AXES] + [row[name] for name in MEASURES]
        cells = [names[row["architecture"]], *(f"{value:.4g}" for value in values)]
        lines.append({"cells": cells, "keys": [row["architecture"], *values], "link": None})
    head = ["architecture", "asked L0", "correlated", "features per dimension", *MEASURES.values()]
    return {"head": head, "rows": lines}
