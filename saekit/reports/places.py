"""Points over L0: how that axis is scaled, and where the words of a point have room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.figures import INK, plain
from saekit.reports.frontier import spreads

__all__ = ["l0_label", "label_points", "scale_l0"]

_OFFSETS = (
    (7, 5), (-7, 5), (7, -5), (-7, -5), (0, 10), (0, -10), (10, 0), (-10, 0), (7, 14), (-7, 14), (7, -14), (-7, -14),
)  # fmt: skip
"""Where a point's label may be, in points of type from it: the first place that is free."""
_HALF, _NEAR = 8.0, 40.0
"""Pixels: half of what a point takes, and within what a label need not be said twice."""


def scale_l0(axes: Any, xs: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where there is enough of it for one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if spreads(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 300 * min(xs) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def l0_label(xs: Sequence[float]) -> str:
    """What stands below the axis of :func:`scale_l0`."""
    return "L0, features per token" + (", on a logarithmic scale" if spreads(xs) else "")


def label_points(axes: Any, labels: Sequence[tuple[str, tuple[float, float]]], *, lift: float = 0) -> None:
    """Write the words of each point beside it, where there is room; what has none, and what a neighbor says, is not.

    ``lift`` is how many points of type more above or below, where bars run through the points.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    axes.get_xlim(), axes.get_ylim()  # which have to be found before anything can be placed
    points = [(printable(words), place, axes.transData.transform(place)) for words, place in labels]
    taken = [Bbox.from_bounds(x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF) for *_, (x, y) in points]
    said: list[tuple[str, float, float]] = []
    for words, place, (x, y) in points:
        if any(words == other and math.hypot(x - at, y - height) < _NEAR for other, at, height in said):
            continue
        for dx, dy in _lifted(lift):
            text = axes.annotate(
                words, place, xytext=(dx, dy), textcoords="offset points", fontsize=9.5, color=INK, zorder=4,
                ha={1: "left", 0: "center", -1: "right"}[(dx > 0) - (dx < 0)], va="center",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            box = plain(text).get_window_extent()
            own = Bbox.from_bounds(x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF).bounds
            if _inside(box, axes.bbox) and not any(box.overlaps(other) for other in taken if other.bounds != own):
                taken.append(box)
                said.append((words, x, y))
                break
            text.remove()


def _lifted(lift: float) -> list[tuple[float, float]]:
    if not lift:
        return [*_OFFSETS]
    return [(dx, dy + lift if dy > 0 else dy - lift) for dx, dy in _OFFSETS if dx and dy]


def _inside(box: Any, outer: Any) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
