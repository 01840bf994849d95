"""The curves of one SAE's training, as a figure of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from saekit.plugins.text import printable
from saekit.reports.colors import PALETTE
from saekit.reports.figures import GRAY, INK, RED, new_figure, plain, style_axes
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


def headline(sae: SAERun, state: State) -> tuple[str, str, str]:
    """What is above the curves: the name, what was trained, and how it ended, if not as it was to."""
    parts = [sae.what, sae.where, f"{short_count(sae.tokens)} tokens"]
    why = sae.why_diverged
    end = "" if state.kind == "finished" and why is None else state.text if why is None else f"diverged: {why}"
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
    rows = -(-len(panels) // 2)
    title, subtitle, end = headline(sae, state)
    lines = [_cut(title, 58), *_wrapped(subtitle, 82)] + ([_cut(end, 84)] if end else [])
    figure = new_figure(7.2, 2.35 * rows + 0.5 + 0.24 * len(lines))
    _head(figure, lines, bool(end))
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, sae)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[len(panels) - 2 : len(panels)]:
        axes.set_xlabel("tokens", fontsize=10.5, color=GRAY)
    _legend(figure, panels)
    figure.draw_without_rendering()  # where the ends of curves are depends on the layout
    for axes, panel in zip(grid.flat, panels, strict=False):
        _write_ends(axes, panel)
    return figure


def _head(figure: Any, lines: Sequence[str], ended_early: bool) -> None:
    """The title and what is below it, at the left."""
    height = figure.get_size_inches()[1]
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (0.3 + 0.24 * (len(lines) - 1)) / height))
    for number, line in enumerate(lines):
        last = ended_early and number == len(lines) - 1
        look: dict[str, Any] = {"fontsize": 10.5, "color": RED if last else GRAY}
        if number == 0:
            look = {"fontsize": 13, "color": INK, "fontweight": "bold"}
        y = 1 - (0.08 + 0.24 * number + (0.04 if number else 0)) / height
        plain(figure.text(0.016, y, line, va="top", ha="left", **look)).set_in_layout(False)


def _draw(axes: Any, panel: Panel, sae: SAERun) -> None:
    """Lines, points and axes of one panel."""
    style_axes(axes)
    for line in panel.lines:
        _draw_line(axes, line)
    plain(axes.set_title(panel.title, fontsize=11.5, loc="left", color=INK, pad=7))
    _limit(axes, panel)
    _mark_fine_tuning(axes, panel, sae)
    if panel.note:
        plain(
            axes.text(0.03, 0.04, panel.note, transform=axes.transAxes, fontsize=10, color=RED, va="bottom", ha="left")
        )


def _draw_line(axes: Any, line: Line) -> None:
    look = dict(_LOOKS[line.look])
    xs = [piece.x for piece in line.pieces]
    ys = [piece.mean for piece in line.pieces]
    if "marker" in look:
        if len(xs) > _MANY:
            look |= {"linestyle": "-", "marker": "none", "linewidth": 1.6}
        axes.plot(xs, ys, zorder=4, markeredgecolor="white", markeredgewidth=0.8, clip_on=False, **look)
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
    axes.set_xlim(0, last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if panel.log:
        axes.set_yscale("log")
        values = [value for line in panel.lines for value in line.values]
        subs = (1, 2, 5) if max(values) < 200 * min(values) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
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


def _legend(figure: Any, panels: Sequence[Panel]) -> None:
    """What the points are, where there are any."""
    from matplotlib.lines import Line2D

    looks = {line.look: line.name for panel in panels for line in panel.lines if "marker" in _LOOKS[line.look]}
    handles = [
        Line2D([], [], label=name, markeredgecolor="white", markeredgewidth=0.8, **_LOOKS[look])
        for look, name in looks.items()
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside upper right", ncols=len(handles), fontsize=10.5, frameon=False,
            handletextpad=0.2, columnspacing=1.2, borderaxespad=0.0, labelcolor=INK,
        )  # fmt: skip


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _wrapped(text: str, width: int) -> list[str]:
    """In two lines at most, broken between parts."""
    if len(text) <= width:
        return [text]
    first, second = "", ""
    for part in text.split(" · "):
        joined = f"{first} · {part}" if first else part
        if second or (first and len(joined) > width):
            second = f"{second} · {part}" if second else part
        else:
            first = joined
    return [_cut(line, width) for line in (first, second) if line]
