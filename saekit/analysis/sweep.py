"""A picture of a sweep: sparsity against fidelity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_sweep"]

_PANELS = {"explained_variance": "Explained variance", "ce_recovered": "CE recovered"}


def plot_sweep(rows: Sequence[Mapping[str, Any]], options: Sequence[str], to: Path) -> Path | None:
    """L0 against explained variance and against CE recovered, a point for each SAE, as a PNG at ``to``.

    ``rows`` are those of :attr:`saekit.SweepResult.summary`, and ``options`` the columns that were changed, which label
    the points.  None when no row has the numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [key for key in _PANELS if any(_point(row, key) for row in rows)]
    if not panels:
        return None
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for row in rows:
            if (point := _point(row, key)) is not None:
                axes.plot(*point, "o", color="#3465a4", markersize=6)
                label = ", ".join(f"{option.rpartition('.')[2]}={row[option]}" for option in options) or row["name"]
                axes.annotate(label, point, xytext=(5, 4), textcoords="offset points", fontsize=7)
        axes.set_title(f"{_PANELS[key]} against L0", fontsize=10, loc="left")
        axes.set_xlabel("L0: features firing per token", fontsize=9)
        axes.set_xscale("log")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)
    return to


def _point(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    l0, value = row["l0"], row[key]
    return (l0, value) if l0 and value is not None else None
