"""The picture of SAEs that were compared: L0 against fidelity, each a named point with its intervals.

Rows have a ``name``, and of ``l0`` and the panels' metrics the number (``KEY``) and where its interval ends
(``KEY_low``, ``KEY_high``); None where there is none.
"""

from __future__ import annotations

import math
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
    new_figure,
    style_axes,
    write,
    write_head,
)
from saekit.reports.frontier import MARKERS, PANELS, has_place, shortened
from saekit.reports.numbers import fraction, number
from saekit.reports.page import over_l0, short_number, whole_page
from saekit.reports.places import l0_label, label_points, scale_l0

__all__ = ["comparison_figure", "comparison_page"]

_ROW = 3.35
"""Inches of a panel with its title."""
_MOST_LABEL = 26
_FOOT = "Bars are 95 % intervals by bootstrap over contexts. Made by saekit {version} from compare.json."

Row = Mapping[str, Any]


def comparison_figure(rows: Sequence[Row], title: str, lines: Sequence[str]) -> Any:
    """A figure of matplotlib, with ``lines`` of words below its title; None where no row has a place in a panel."""
    panels = _panels(rows)
    if not panels:
        return None
    handles, columns = list(_handles(rows)), _columns(rows)
    top = 2 * MARGIN + (1 + len(lines)) * LINE
    head = top + MARGIN + 0.245 * -(-len(handles) // columns)
    left_out = [str(row["name"]) for row in rows if not any(has_place(row, key) for key in PANELS)]
    notes = ["Bars are 95 % intervals by bootstrap over contexts."]
    notes += ["Without numbers, and not drawn: " + ", ".join(left_out)] if left_out else []
    figure = new_figure(WIDTH, head + _ROW * len(panels) + 0.38 + LINE * len(notes))
    write_head(figure, [printable(line) for line in (title, *lines)])
    add_legend(figure, handles, top, columns)
    for place, key in enumerate(panels):
        axes = add_axes(figure, 0.7, head + _ROW * place + 0.33, WIDTH - 0.7 - 2 * MARGIN, _ROW - 0.75)
        _draw(axes, key, rows)
    drawn = [row["l0"] for row in rows if has_place(row, panels[-1])]
    figure.axes[-1].set_xlabel(l0_label(drawn), fontsize=10.5, color=GRAY)
    height = figure.get_size_inches()[1]
    for line, note in enumerate(reversed(notes)):
        write(figure, MARGIN, height - LINE * (line + 1), printable(shortened(note, 100)), fontsize=9.5)
    return figure


def _panels(rows: Sequence[Row]) -> list[str]:
    return [key for key in PANELS if any(has_place(row, key) for row in rows)]


def _looks(rows: Sequence[Row]) -> dict[str, tuple[tuple[str, str], str]]:
    """By names: the colors on a light and on a dark ground, and the shape."""
    names = [str(row["name"]) for row in rows]
    colors = colors_of(names)
    return {name: (colors[name], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)}


def _columns(rows: Sequence[Row]) -> int:
    longest = max(len(str(row["name"])) for row in rows)
    return 1 if longest > 36 else 2 if longest > 22 else 3


def _handles(rows: Sequence[Row]) -> Iterator[Any]:
    from matplotlib.lines import Line2D

    for name, (colors, marker) in _looks(rows).items():
        yield Line2D(
            [], [], color=colors[0], marker=marker, markersize=8, linestyle="none", markeredgecolor="white",
            label=shortened(printable(name), 70),
        )  # fmt: skip


def _draw(axes: Any, key: str, rows: Sequence[Row]) -> None:
    """The points of one panel with their bars and names."""
    style_axes(axes)
    drawn, looks = [row for row in rows if has_place(row, key)], _looks(rows)
    for row in drawn:
        (color, _), marker = looks[str(row["name"])]
        x, y = row["l0"], row[key]
        axes.errorbar(
            x, y, xerr=_reach(row, "l0"), yerr=_reach(row, key), color=color, marker=marker, markersize=8,
            markeredgecolor="white", markeredgewidth=0.8, elinewidth=1.5, capsize=3, zorder=3,
        )  # fmt: skip
    axes.set_title(f"{PANELS[key]} over L0", fontsize=11, loc="left", color=INK, pad=7)
    axes.margins(0.12)
    scale_l0(axes, [row["l0"] for row in drawn])
    labels = [(shortened(str(row["name"]), _MOST_LABEL), (row["l0"], row[key])) for row in drawn]
    label_points(axes, labels, lift=4)


def _reach(row: Row, key: str) -> list[list[float]] | None:
    """How far the bars reach below and above the number; None: they are not known."""
    low, high = _ends(row, key)
    return None if low is None or high is None else [[row[key] - low], [high - row[key]]]


def _ends(row: Row, key: str) -> tuple[float | None, float | None]:
    """Where the bars of a point end; L0 is above 0, which a logarithmic axis needs."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return None, None
    return (max(low, row[key] / 100), high) if key == "l0" else (low, high)


def comparison_page(
    rows: Sequence[Row],
    title: str,
    lines: Sequence[str],
    tables: Sequence[Mapping[str, Any]],
    verdicts: Sequence[str] = (),
) -> str | None:
    """The same as a page, with the ``verdicts`` below its title, ``lines`` of words below these, and ``tables``
    (``title``, ``head`` and ``rows`` of texts) at its end; None where there is nothing to draw."""
    if not (panels := _panels(rows)):
        return None
    looks = _looks(rows)
    entries = [
        {"name": printable(name), "look": "points", "marker": marker, "tag": name, "light": light, "dark": dark}
        for name, ((light, dark), marker) in looks.items()
    ]
    data = {
        "tiles": [],
        "marks": [],
        "legend": [{"what": "", "entries": entries}],
        "groups": [{"kind": "points", "charts": [_chart(rows, key, looks) for key in panels]}],
        "tables": [_table(table) for table in tables],
    }
    head = [*(("item", verdict) for verdict in verdicts), *(("sub", line) for line in lines)]
    return whole_page(title, head, data, _FOOT)


def _chart(rows: Sequence[Row], key: str, looks: Mapping[str, Any]) -> dict[str, Any]:
    drawn = [row for row in rows if has_place(row, key)]
    lines = []
    for row in drawn:
        (light, dark), marker = looks[str(row["name"])]
        line = {
            "name": printable(str(row["name"])), "look": "points", "marker": marker, "light": light, "dark": dark,
            "tags": [row["name"]], "x": [short_number(row["l0"])], "y": [short_number(row[key])],
            "labels": [printable(shortened(str(row["name"]), _MOST_LABEL))], "hover": [_hover(row)],
        }  # fmt: skip
        bars = {axis: _ends(row, one) for axis, one in (("x", "l0"), ("y", key))}
        if all(end is not None for ends in bars.values() for end in ends):
            line["bars"] = {
                axis: [[short_number(end) for end in ends if end is not None]] for axis, ends in bars.items()
            }
        lines.append(line)
    return over_l0(key, [row["l0"] for row in drawn], lines)


def _hover(row: Row) -> str:
    numbers = [f"L0 {number(row['l0'])}"]
    numbers += [f"{PANELS[key]} {fraction(row[key])}" for key in PANELS if has_place(row, key)]
    return printable("\n".join([str(row["name"]), *numbers]), keep="\n")


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """As the page has it: what is sorted by are numbers where a cell is one."""
    lines = [
        {"cells": [printable(str(cell)) for cell in row], "keys": [_key(cell) for cell in row], "link": None}
        for row in table["rows"]
    ]
    return {"title": table["title"], "head": [printable(name) for name in table["head"]], "rows": lines}


def _key(cell: Any) -> Any:
    try:
        return float(str(cell).split(" ")[0].replace(",", ""))
    except ValueError:
        return str(cell)
