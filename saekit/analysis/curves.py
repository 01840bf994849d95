"""A picture of a run's metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from saekit.errors import PlaceError

__all__ = ["plot_training_curves", "read_metrics"]

_PANELS = [
    ("Reconstruction error (mse)", "losses/mse_loss", "log"),
    ("Explained variance", "metrics/explained_variance", "linear"),
    ("L0: features firing per token", "metrics/l0", "log"),
    ("Dead features", "sparsity/dead_features", "linear"),
]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` in a run folder."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise PlaceError(f"{folder} has no metrics.jsonl: it is not a run folder, or its run had no jsonl tracker")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def plot_training_curves(folder: Path, to: Path, panels: Sequence[tuple[str, str, str]] = tuple(_PANELS)) -> Path:
    """Draw the metrics of the run in ``folder`` against tokens, as a PNG at ``to``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(folder)
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"saekit: {folder.name}", fontsize=12)
    for axes, (title, key, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        points = [(line["details/n_training_tokens"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], color="#3465a4", linewidth=1.6)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yscale(scale)
        axes.grid(alpha=0.25, which="both")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("tokens", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)
    return to
