"""What a picture of a run shows, for whoever draws it: panels with lines, marks, limits and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import attrs

from saekit.reports.folder import SAERun
from saekit.reports.history import History, Piece
from saekit.reports.numbers import count, fraction, number, short_count

__all__ = ["Line", "Panel", "coefficients_of", "panels_of"]

_MUCH = 20  # times the least value: from there on, a logarithmic axis shows more
_RATE = "details/current_learning_rate"
_LAMBDAS = ("l1_coefficient", "l0_coefficient")
_IN_WORDS = {"topk_threshold": "Threshold"}


@attrs.frozen
class Line:
    """One metric in a panel."""

    name: str
    look: str
    """``line``, ``dashed``, ``held out`` (dots) or ``recovered`` (diamonds)."""
    pieces: Sequence[Piece]
    end: str
    """Its last number, to be written where it ends."""

    @property
    def values(self) -> list[float]:
        """Its finite numbers, the least and largest of each piece included."""
        return [value for piece in self.pieces for value in (piece.low, piece.high) if math.isfinite(value)]


@attrs.frozen
class Panel:
    """One picture among several over the same tokens."""

    title: str
    lines: Sequence[Line]
    lower: float | None
    """Where the axis begins and ends; None: where the numbers do."""
    upper: float | None
    log: bool = False
    text: Callable[[float], str] = number
    """How numbers at the axis are written."""
    whole: bool = False
    """Whether its numbers are whole ones."""
    note: str = ""
    """What cannot be seen in it, in words."""
    setting: bool = False
    """Whether it shows what was set, and not what came of it."""


def panels_of(sae: SAERun, most: int | None = None) -> list[Panel]:
    """Loss, explained variance, L0, dead features, λ where there is one, and the learning rate, as far as known.

    ``most`` pieces of each line.
    """
    history = sae.history
    found = [
        _loss(history, most),
        _explained(history, most),
        _l0(history, most),
        _dead(sae, most),
        *(_setting(history, key, title, most) for key, title in coefficients_of(history).items()),
        _setting(history, _RATE, "Learning rate", most),
    ]
    return [panel for panel in found if any(line.values for line in panel.lines)]


def coefficients_of(history: History) -> dict[str, str]:
    """What makes features sparse, with its name: of most architectures λ, of others k, or a threshold, or nothing."""
    keys = [key for key in history.series if key.startswith("details/current_") and key != _RATE]
    named = sorted(keys, key=lambda key: not key.endswith(_LAMBDAS))
    return {key: _named(key) for key in named[:1]}


def _named(key: str) -> str:
    name = key.removeprefix("details/current_")
    return f"λ, {name}" if key.endswith(_LAMBDAS) else _IN_WORDS.get(name, name)


def _line(
    history: History, key: str, name: str, look: str, most: int | None, text: Callable[[float], str]
) -> Iterator[Line]:
    if (series := history.series.get(key)) is not None:
        last = text(series.last) if math.isfinite(series.last) else "nan"
        yield Line(name, look, series.pieces(most), last)


def _loss(history: History, most: int | None) -> Panel:
    lines = [*_line(history, "losses/overall_loss", "loss", "line", most, number)]
    mse = [*_line(history, "losses/mse_loss", "mse", "dashed", most, number)]
    if not lines:
        return _free("Loss", [attrs.evolve(line, look="line") for line in mse])
    if mse and mse[0].values != lines[0].values:
        return _free("Loss (dashed: mse)", [*lines, *mse])
    return _free("Loss", lines)


def _free(title: str, lines: Sequence[Line]) -> Panel:
    """A panel whose axis goes by the numbers."""
    values = [value for line in lines for value in line.values]
    wide = bool(values) and min(values) > 0 and max(values) >= _MUCH * min(values)
    return Panel(title, lines, None, None, log=wide)


def _explained(history: History, most: int | None) -> Panel:
    lines = [
        *_line(history, "metrics/explained_variance", "in training", "line", most, fraction),
        *_line(history, "evals/explained_variance", "held out", "held out", most, fraction),
        *_line(history, "evals/ce_recovered", "CE recovered", "recovered", most, fraction),
    ]
    return Panel("Explained variance", lines, 0.0, 1.0, text=lambda value: f"{value:g}", note=_below(lines))


def _below(lines: Sequence[Line]) -> str:
    """What lies below an axis that begins at 0, in few words."""
    below = [(line, [piece for piece in line.pieces if piece.mean < 0]) for line in lines]
    for line, pieces in below:
        if pieces and pieces[-1].x >= line.pieces[-1].x:
            return "still below 0" if line.look == "line" else f"{line.name} below 0"
    trained = next((pieces for line, pieces in below if line.look == "line"), [])
    return f"below 0 until {short_count(trained[-1].x)}" if trained else ""


def _l0(history: History, most: int | None) -> Panel:
    lines = [
        *_line(history, "metrics/l0", "in training", "line", most, number),
        *_line(history, "evals/l0", "held out", "held out", most, number),
    ]
    panel = _free("L0, features per token", lines)
    return panel if panel.log else _from_zero(panel)


def _from_zero(panel: Panel) -> Panel:
    values = [value for line in panel.lines for value in line.values]
    top = max(values, default=0.0)
    return attrs.evolve(panel, lower=0.0, upper=1.12 * top) if top > 0 else attrs.evolve(panel, lower=0.0, upper=1.0)


def _dead(sae: SAERun, most: int | None) -> Panel:
    lines = [*_line(sae.history, "sparsity/dead_features", "in training", "line", most, count)]
    title = f"Dead features, of {sae.d_sae:,}" if sae.d_sae else "Dead features"
    return attrs.evolve(_from_zero(Panel(title, lines, None, None)), text=short_count, whole=True)


def _setting(history: History, key: str, title: str, most: int | None) -> Panel:
    return _from_zero(Panel(title, [*_line(history, key, "", "line", most, number)], None, None, setting=True))
