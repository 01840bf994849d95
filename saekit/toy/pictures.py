"""Pictures of features in two dimensions, by matplotlib; moving ones by pillow, which comes with it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.files.paths import as_path
from saekit.files.storage import write_bytes
from saekit.reports.colors import colors_of
from saekit.reports.figures import (
    GRAY,
    INK,
    LINE,
    MARGIN,
    add_axes,
    as_png,
    new_figure,
    plain,
    style_axes,
    styled,
    write,
)
from saekit.sae.module import SAEModule
from saekit.toy.config import ToyConfig
from saekit.toy.model import ToyModel
from saekit.toy.training import ToyTraining

__all__ = ["animate_directions", "plot_directions"]

_SIDE = 3.9  # inches of the square
_LEFT, _BOTTOM = 0.55, 0.35
_MOST_LABELS = 30
_FRAME, _LAST_FRAME = 90, 1500  # milliseconds


def plot_directions(model: ToyModel, path: str | Path | None = None, *, sae: SAEModule | None = None) -> Any:
    """Each feature of ``model`` as an arrow from zero, in the two dimensions of its hidden layer.

    With an ``sae`` that was trained on these, its decoder's directions are dashed lines.  Arrows are colored by
    importance where importances differ.  Returns the figure of matplotlib, and writes it to ``path``, a PNG file, where
    one is given.  :class:`ValueError` unless the hidden layer has 2 dimensions.
    """
    target = _target(path, ".png")
    found = None if sae is None else sae.scaled_decoder().detach().cpu()
    _check_flat(model.config.n_hidden)
    if found is not None and found.shape[1] != 2:
        raise ValueError(f"the SAE writes vectors of {found.shape[1]} numbers, and the picture has 2 dimensions")
    with styled():
        figure = _drawn(model.directions.cpu(), model.config, "", found)
        if target is not None:
            write_bytes(target, as_png(figure))
    return figure


def animate_directions(training: ToyTraining, path: str | Path) -> Path:
    """How the features of a toy model found their places: the frames that ``train_toy_model(..., frames=40)`` kept, as
    a GIF file at ``path``.  :class:`ValueError` unless the hidden layer has 2 dimensions."""
    target, config = _target(path, ".gif"), training.model.config
    assert target is not None
    _check_flat(config.n_hidden)
    reach = _reach(training.frames)
    with styled():
        pictures = [
            _pixels(_drawn(directions.cpu(), config, f"step {step:,}", None, reach))
            for directions, step in zip(training.frames, training.frame_steps, strict=True)
        ]
    write_bytes(target, _as_gif(pictures))
    return target


def _target(path: str | Path | None, suffix: str) -> Path | None:
    if path is not None and Path(path).suffix.lower() != suffix:
        raise ValueError(f"the name of the picture must end in {suffix}, found {str(path)!r}")
    return None if path is None else as_path(path)


def _check_flat(n_hidden: int) -> None:
    if n_hidden != 2:
        raise ValueError(f"the picture has 2 dimensions, and the hidden layer of this toy model {n_hidden}")


def _reach(directions: Tensor) -> float:
    return 1.15 * max(float(directions.norm(dim=-1).max()), 1e-3)


def _drawn(directions: Tensor, config: ToyConfig, note: str, found: Tensor | None, reach: float | None = None) -> Any:
    reach = reach or _reach(directions)
    head = 2 * MARGIN + 2 * LINE
    figure = new_figure(_LEFT + _SIDE + 2 * MARGIN, head + _SIDE + _BOTTOM)
    lines = _head(config, note, found)
    write(figure, MARGIN, MARGIN, lines[0], fontsize=12, color=INK, fontweight="bold")
    write(figure, MARGIN, MARGIN + LINE + 0.03, lines[1])
    axes = add_axes(figure, _LEFT, head, _SIDE, _SIDE)
    style_axes(axes)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    for row in [] if found is None else found / found.norm(dim=1, keepdim=True).clamp_min(1e-12) * reach:
        axes.plot([0, row[0].item()], [0, row[1].item()], color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    colors = _colors(config)
    for number, row in enumerate(directions):
        x, y = row.tolist()
        look = {"arrowstyle": "-|>", "color": colors[number], "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x, y), xytext=(0, 0), arrowprops=look, zorder=3)
        if len(directions) <= _MOST_LABELS and row.norm() > 0.1 * reach:
            far = row / row.norm() * (row.norm() + 0.06 * reach)
            text = axes.text(*far.tolist(), str(number), fontsize=10.5, color=INK, ha="center", va="center", zorder=4)
            plain(text)
    return figure


def _head(config: ToyConfig, note: str, found: Tensor | None) -> tuple[str, str]:
    chance = sorted(set(config.probabilities))
    fires = f"{chance[0]:g}" if len(chance) == 1 else f"{chance[0]:g} to {chance[-1]:g}"
    parts = [f"firing probability {fires}", note, "" if found is None else f"dashed: the SAE's {len(found)}"]
    return f"{config.n_features} features in 2 dimensions", " · ".join(part for part in parts if part)


def _colors(config: ToyConfig) -> list[str]:
    """One for each feature, on a light ground: by importance, or one after the other where all are alike."""
    values: Sequence[float] = config.importances
    if len(set(values)) > 1:
        shades = colors_of(sorted(set(values), reverse=True), ordered=True)
        return [shades[value][0] for value in values]
    return [shade for shade, _ in colors_of(range(len(values))).values()]


def _pixels(figure: Any) -> Any:
    from PIL import Image

    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")


def _as_gif(pictures: Sequence[Any]) -> bytes:
    """All frames with the colors of the last, which has them all, at two thirds of the size of a still picture."""
    small = [picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)) for picture in pictures]
    palette = small[-1].quantize(256)
    frames = [picture.quantize(palette=palette, dither=0) for picture in small]
    target = io.BytesIO()
    frames[0].save(
        target, format="GIF", save_all=True, append_images=frames[1:], loop=0, optimize=True,
        duration=[_FRAME] * (len(frames) - 1) + [_LAST_FRAME],
    )  # fmt: skip
    return target.getvalue()
