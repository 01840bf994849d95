"""Figures by matplotlib, whatever its settings are in this process, and without a window."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["GRAY", "INK", "RED", "as_png", "new_figure", "plain", "style_axes", "styled"]

INK, GRAY, RED = "#1a1a1a", "#6b6b6b", "#b3261e"
_DPI = 150


@contextmanager
def styled() -> Iterator[None]:
    """The settings that pictures are drawn with: those that matplotlib comes with, not what a person has set.

    Letters that no font has are drawn as boxes, without a warning.
    """
    import matplotlib

    own = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(own), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches; at 400 pixels across, its smallest letters can still be read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, hspace=0.04, wspace=0.05)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=engine)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any) -> None:
    """Quiet axes: a light grid, two spines, letters that stay readable."""
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=10.5, colors=GRAY, length=3)


def plain(text: Any) -> Any:
    """A text of matplotlib's that shows a dollar as a dollar."""
    text.set_parse_math(False)
    return text


def as_png(figure: Any) -> bytes:
    """The figure as the bytes of a file."""
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
