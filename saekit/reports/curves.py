"""The curves of one SAE's training, as a figure of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.colors import PALETTE
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
    plain,
    style_axes,
    write,
    write_head,
)
from saekit.reports.folder import SAERun, State
from saekit.reports.numbers import short_count
from saekit.reports.panels import Line, Panel, panels_of

__all__ = ["curves_figure", "headline"]

_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"color": PALETTE[0][0], "linewidth": 2.0},
    "dashed": {"color": PALETTE[5][0], "linewidth": 1.6, "linestyle": (0, (4, 2))},
    "held out": {"color": PALETTE[1][0], "marker": "o", "markersize": 6.5, "linestyle": "none"},
    "recovered": {"color": PALETTE[2][0], "marker": "D", "markersize": 6, "linestyle": "none"},
}
_FEW = 12
"""So few points are shown as points, too."""
_MANY = 40
"""From so many evals on, a line shows them better than points."""
_BETWEEN = 13.0
"""Points of type between two numbers at the ends of curves."""
_ROW, _TITLE, _HEIGHT = 2.28, 0.33, 1.58
"""Inches of a row of panels, of the title in it, and of the axes."""
_TICKS, _ENDS = 0.7, 0.68
"""Inches for the numbers at the left of the axes, and for those at the ends of curves."""


def headline(sae: SAERun, state: State) -> tuple[str, str, str]:
    """What is above the curves: the name, what was trained, and how it ended, if not as it was to."""
    parts = [sae.what, sae.where, f"{short_count(sae.tokens)} tokens"]
    why = sae.why_diverged
    end = "" if state.kind == "finished" and why is None else state.outcome if why is None else f"diverged: {why}"
    total = sae.options.total_tokens
    if end and sae.tokens < total:
        end = f"{end}, at {short_count(sae.tokens)} of {short_count(total)} tokens" if why is None else end
    return (
        printable(sae.home.resolve().name),
        printable(" · ".join(part for part in parts if part)),
        printable(end),
    )


def curves_figure(sae: SAERun, state: State) -> Any:
    """The panels of :func:`saekit.reports.panels.panels_of` in two columns; None where nothing was logged."""
    panels = panels_of(sae)
    if not panels:
        return None
    title, subtitle, end = headline(sae, state)
    lines = [title, *_wrapped(subtitle, 90)] + ([end] if end else [])
    points = {line.look: line.name for panel in panels for line in panel.lines if "marker" in _LOOKS[line.look]}
    head = 2 * MARGIN + LINE * (len(lines) + bool(points))
    figure = new_figure(WIDTH, head + _ROW * -(-len(panels) // 2) + 0.2)
    write_head(figure, lines, last_is_red=bool(end))
    if points:
        add_legend(figure, _handles(points), MARGIN + 0.02 + LINE * len(lines), 1 + len(points))
    for number, panel in enumerate(panels):
        left, top = WIDTH / 2 * (number % 2), head + _ROW * (number // 2)
        axes = add_axes(figure, left + _TICKS, top + _TITLE, WIDTH / 2 - _TICKS - _ENDS, _HEIGHT)
        _draw(axes, panel, sae)
        _write_ends(axes, panel)
        if panel.note:
            write(figure, left + WIDTH / 2 - MARGIN, top + 0.09, panel.note, fontsize=9, color=RED, ha="right")
        if number + 2 >= len(panels):
            axes.set_xlabel("tokens", fontsize=10.5, color=GRAY)
    return figure


def _draw(axes: Any, panel: Panel, sae: SAERun) -> None:
    """Lines, points and axes of one panel."""
    style_axes(axes)
    for line in panel.lines:
        _draw_line(axes, line, panel)
    plain(axes.set_title(panel.title, fontsize=11, loc="left", color=INK, pad=7))
    _limit(axes, panel)
    _mark_fine_tuning(axes, panel, sae)


def _draw_line(axes: Any, line: Line, panel: Panel) -> None:
    look = dict(_LOOKS[line.look])
    xs = [piece.x for piece in line.pieces]
    ys = [piece.mean for piece in line.pieces]
    if "marker" in look:
        if len(xs) > _MANY:
            look |= {"linestyle": "-", "marker": "none", "linewidth": 1.6}
        lower, upper = (limit if limit is not None else math.nan for limit in (panel.lower, panel.upper))
        inside = [math.nan if y < lower or y > upper else y for y in ys]  # they are not cut at the edge, as lines are
        axes.plot(xs, inside, zorder=4, markeredgecolor="white", markeredgewidth=0.8, clip_on=False, **look)
        return
    if len(xs) <= _FEW:
        look |= {"marker": "o", "markersize": 4}
    axes.plot(xs, ys, zorder=3, **look)
    low, high = [piece.low for piece in line.pieces], [piece.high for piece in line.pieces]
    if low != high:
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0, zorder=2)


def _limit(axes: Any, panel: Panel) -> None:
    """Axes from where to where, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    last = max(piece.x for line in panel.lines for piece in line.pieces)
    axes.set_xlim(0, 1.015 * last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if panel.log:
        axes.set_yscale("log")
        values = [value for line in panel.lines for value in line.values]
        subs = (1, 2, 5) if max(values) < 200 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=panel.whole))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.text(value)))
    if panel.lower is not None:
        axes.set_ylim(panel.lower, panel.upper)


def _mark_fine_tuning(axes: Any, panel: Panel, sae: SAERun) -> None:
    """A line where fine-tuning begins; in the first panel, with its name."""
    begin = sae.options.whole("training.training_tokens")
    if not sae.options.whole("training.finetuning_tokens") or not 0 < begin < sae.tokens:
        return
    axes.axvline(begin, color=GRAY, linewidth=1, linestyle=":", zorder=1)
    if panel.title.startswith("Loss"):
        axes.text(
            begin, 1.0, "fine-tuning ", transform=axes.get_xaxis_transform(), fontsize=10, color=GRAY, va="top",
            ha="right",
        )  # fmt: skip


def _write_ends(axes: Any, panel: Panel) -> None:
    """The last numbers at the right of where curves end, none on top of another."""
    scale = axes.figure.dpi / 72
    ends = []
    for line in panel.lines:
        finite = [piece for piece in line.pieces if math.isfinite(piece.mean)]
        if finite:
            low, high = axes.get_ylim()
            at = min(max(finite[-1].mean, low), high)
            ends.append((axes.transData.transform((finite[-1].x, at))[1], line))
    ends.sort(key=lambda end: end[0])
    heights: list[float] = []
    for y, _ in ends:
        heights.append(max(y, heights[-1] + _BETWEEN * scale) if heights else y)
    over = heights[-1] - axes.bbox.y1 if heights else 0.0
    if over > 0 and len(heights) > 1:  # pushed above the axes: down again, as far as there is room
        top = axes.bbox.y1
        for number in range(len(heights) - 1, -1, -1):
            heights[number] = min(heights[number], top)
            top = heights[number] - _BETWEEN * scale
    for (_, line), height in zip(ends, heights, strict=True):
        place = axes.transAxes.inverted().transform((axes.bbox.x1, height))[1]
        text = axes.annotate(
            line.end, (1.0, place), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
            color=_LOOKS[line.look]["color"], fontsize=10.5, fontweight="bold", va="center", ha="left",
            annotation_clip=False,
        )  # fmt: skip
        plain(text)


def _handles(points: Mapping[str, str]) -> list[Any]:
    """What a legend shows of the ``points``, by their looks, and of the line."""
    from matplotlib.lines import Line2D

    looks = {"line": "in training", **points}
    return [
        Line2D([], [], label=name, markeredgecolor="white", markeredgewidth=0.8, **_LOOKS[look])
        for look, name in looks.items()
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """In lines of about ``width`` letters, broken between parts."""
    lines = [""]
    for part in text.split(" · "):
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        if lines[-1] and len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    return lines
