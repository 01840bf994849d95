"""Figures by matplotlib, whatever its settings are in this process, and without a window."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from saekit.garbage import uncollected

__all__ = [
    "GRAY", "INK", "LINE", "MARGIN", "RED", "WIDTH", "add_axes", "add_legend", "as_png", "new_figure", "plain",
    "style_axes", "styled", "write", "write_head",
]  # fmt: skip

INK, GRAY, RED = "#1a1a1a", "#6b6b6b", "#b3261e"
WIDTH, LINE, MARGIN = 7.2, 0.235, 0.1
"""Inches: of a picture across, of a line of its head, and around it."""
_DPI = 150


@contextmanager
def styled() -> Iterator[None]:
    """The settings that pictures are drawn with: those that matplotlib comes with, not what a person has set.

    Letters that no font has are drawn as boxes, without a warning.  A picture is many objects for a moment, so that
    nobody looks for garbage meanwhile: it took a third of the time.
    """
    with uncollected(), warnings.catch_warnings():
        import matplotlib

        own = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
        warnings.simplefilter("ignore")
        with matplotlib.rc_context(own):
            yield


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches; at 400 pixels across, its smallest letters can still be read.

    What is in it is placed by hand, which takes a third of the time that matplotlib takes to find a layout.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at so many inches from the left and from the top."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = 1 - (top + height) / whole_height
    return figure.add_axes((left / whole_width, bottom, width / whole_width, height / whole_height))


def write(figure: Any, left: float, top: float, text: str, **look: Any) -> Any:
    """A line of text below and to the right of a place in inches from the left and from the top."""
    width, height = figure.get_size_inches()
    look = {"fontsize": 10.5, "color": GRAY, "va": "top", "ha": "left", **look}
    return plain(figure.text(left / width, 1 - top / height, text, **look))


def write_head(figure: Any, lines: Sequence[str], *, last_is_red: bool = False) -> None:
    """The title and what is below it, at the left, each line :data:`LINE` inches high."""
    for number, line in enumerate(lines):
        red = last_is_red and number == len(lines) - 1
        title = {"fontsize": 13, "color": INK, "fontweight": "bold"} if number == 0 else {}
        top = MARGIN + LINE * number + (0.03 if number else 0.0)
        _cut_to(WIDTH - 2 * MARGIN, write(figure, MARGIN, top, line, **({"color": RED} if red else {}) | title))


def _cut_to(inches: float, text: Any) -> None:
    """Shorten a text until it is no wider."""
    room = inches * _DPI
    while (width := text.get_window_extent().width) > room and len(text.get_text()) > 2:
        words = text.get_text().removesuffix("…")
        text.set_text(words[: min(int(len(words) * room / width), len(words) - 1)] + "…")


def add_legend(figure: Any, handles: Sequence[Any], top: float, columns: int) -> Any:
    """A legend that begins so many inches from the top, at the left."""
    width, height = figure.get_size_inches()
    drawn = figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=((MARGIN - 0.03) / width, 1 - top / height), ncols=columns,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.0, borderpad=0.1, labelcolor=INK,
        fontsize=10.5, frameon=False,
    )  # fmt: skip
    for text in drawn.get_texts():
        plain(text)
    return drawn


def style_axes(axes: Any) -> None:
    """Quiet axes: a light grid, two spines, letters that stay readable."""
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=10.5, colors=GRAY, length=3)
    axes.tick_params(which="minor", length=0)


def plain(text: Any) -> Any:
    """A text of matplotlib's that shows a dollar as a dollar."""
    text.set_parse_math(False)
    return text


def as_png(figure: Any) -> bytes:
    """The figure as the bytes of a file."""
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
