"""Pages with pictures that answer the mouse: one file each, which needs no network and nothing beside it."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from saekit._version import __version__
from saekit.plugins.text import printable
from saekit.reports.colors import PALETTE
from saekit.reports.curves import headline
from saekit.reports.folder import RunFolder, SAERun, State
from saekit.reports.frontier import PANELS, Look, has_place, key_of, not_drawn, spreads, value_of
from saekit.reports.history import Piece
from saekit.reports.numbers import count, fraction, number, short_count
from saekit.reports.panels import Line, Panel, panels_of
from saekit.reports.sweep import summary_of
from saekit.reports.table import SHOWN

__all__ = ["curves_page", "over_l0", "short_number", "sweep_page", "whole_page"]

_COLORS = {"line": PALETTE[0], "dashed": PALETTE[5], "held out": PALETTE[1], "recovered": PALETTE[2]}
_OVER_TOKENS = (
    "Curves are over tokens. Drag over one to look closer, and double-click to go back. Made by saekit {version} from "
    "metrics.jsonl."
)
_MOST_PIECES = 400
_MOST_OF_A_SWEEP = 12_000
"""So many pieces in each panel of a sweep, of all its SAEs together."""


def curves_page(sae: SAERun, state: State) -> str | None:
    """The curves of one SAE as HTML; None where nothing was logged."""
    panels = panels_of(sae, _MOST_PIECES)
    if not panels:
        return None
    title, subtitle, end = headline(sae, state)
    points = {
        line.look: line.name for panel in panels for line in panel.lines if line.look in ("held out", "recovered")
    }
    entries = [
        {"name": name, "look": look, "marker": "D" if look == "recovered" else "o", "tag": look, **_own(_COLORS[look])}
        for look, name in points.items()
    ]
    training = {"name": "in training", "look": "line", "tag": "line", **_own(_COLORS["line"])}
    data = {
        "tiles": list(_tiles(sae)),
        "marks": _marks(sae),
        "legend": [{"what": "", "entries": [training, *entries]}] if entries else [],
        "groups": [{"kind": "curves", "charts": [_chart(panel) for panel in panels]}],
        "table": None,
    }
    return whole_page(title, [("sub", subtitle), ("end", end)], data, _OVER_TOKENS)


def sweep_page(run: RunFolder) -> str | None:
    """The SAEs of a sweep as HTML: L0 against fidelity, their curves on top of each other, and their numbers.

    None where no SAE has logged anything.
    """
    summary = summary_of(run)
    look = Look.of(summary.rows, summary.options)
    groups: list[dict[str, Any]] = []
    if charts := [_frontier(summary.rows, key, look) for key in PANELS if any(has_place(r, key) for r in summary.rows)]:
        groups.append({"kind": "points", "charts": charts})
    by_name = {row["name"]: row for row in summary.rows}
    if curves := list(_curves(run, by_name, look)):
        groups.append({"kind": "curves", "charts": curves})
    if not groups:
        return None
    first = next(iter(run.saes.values()))
    what = " · ".join(part for part in (look.caption(len(summary.rows)), first.model) if part)
    ended = "" if run.state.kind == "finished" else run.state.outcome
    lines = [("sub", what), ("end", ended), *(("end", note) for note in not_drawn(summary.rows))]
    data = {
        "tiles": [],
        "marks": [],
        "legend": list(_legend(look)),
        "groups": groups,
        "table": _table(run, summary.rows, summary.options),
    }
    return whole_page(printable(run.folder.resolve().name), lines, data, _OVER_TOKENS)


def whole_page(title: str, lines: Sequence[tuple[str, str]], data: Mapping[str, Any], foot: str) -> str:
    """A page of ``data`` as ``page.js`` draws it.  ``lines`` are below the title, each with its class; ``foot`` says
    what is what, of which ``{version}`` is saekit's."""
    head = "\n".join(_head(lines))
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return _resource("page.html").format(
        title=html.escape(title),
        head=head,
        foot=html.escape(foot.format(version=__version__)),
        data=text.replace("<", "\\u003c").replace("&", "\\u0026"),
        css=_resource("page.css"),
        js=_resource("page.js"),
    )


def _head(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A paragraph for each line, and a list for those of the class ``item`` that follow one another."""
    shown = [(kind, html.escape(printable(text))) for kind, text in lines if text]
    for listed, group in itertools.groupby(shown, lambda line: line[0] == "item"):
        if listed:
            yield f'<ul class="items">{"".join(f"<li>{text}</li>" for _, text in group)}</ul>'
        else:
            yield from (f'<p class="{kind}">{text}</p>' for kind, text in group)


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _own(colors: tuple[str, str]) -> dict[str, str]:
    return {"light": colors[0], "dark": colors[1]}


def _tiles(sae: SAERun) -> Iterator[tuple[str, str]]:
    """The main numbers, each with what it is."""
    history = sae.history
    for name, sources, text in (
        ("explained variance", ("evals/explained_variance", "metrics/explained_variance"), fraction),
        ("L0, features per token", ("evals/l0", "metrics/l0"), number),
        ("CE recovered", ("evals/ce_recovered",), fraction),
    ):
        if (value := history.get(*sources)) is not None:
            held_out = sources[0] in history.latest
            yield f"{name}, {'held out' if held_out else 'in training'}", text(value)
    if (dead := history.get("sparsity/dead_features")) is not None:
        yield "dead features" + (f" of {sae.d_sae:,}" if sae.d_sae else ""), count(dead)
    yield "tokens", short_count(sae.tokens)


def _marks(sae: SAERun) -> list[dict[str, Any]]:
    tuned = sae.options.whole("training.finetuning_tokens")
    return [{"x": sae.options.whole("training.training_tokens"), "text": "fine-tuning"}] if tuned else []


def _chart(panel: Panel) -> dict[str, Any]:
    lines = []
    for line in panel.lines:
        tags = ["line" if line.look == "dashed" else line.look]
        lines.append({**_line(line), **_own(_COLORS[line.look]), "tags": tags})
    return _frame(panel, lines)


def _frame(panel: Panel, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A chart as the page draws it."""
    form = "fraction" if panel.upper == 1.0 and panel.lower == 0.0 and "variance" in panel.title else "number"
    return {
        "title": printable(panel.title),
        "log": panel.log,
        "xlog": False,
        "lower": panel.lower,
        "upper": panel.upper,
        "note": panel.note,
        "format": "count" if panel.title.startswith("Dead") else form,
        "lines": list(lines),
    }


def _line(line: Line) -> dict[str, Any]:
    return {"name": line.name, "look": line.look, "end": line.end, **_numbers(line.pieces)}


def _numbers(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The pieces as columns; the least and largest only where they are not the mean."""
    found: dict[str, Any] = {
        "x": [round(piece.x) for piece in pieces],
        "y": [short_number(piece.mean) for piece in pieces],
    }
    if any(piece.low < piece.high for piece in pieces):
        found |= {
            "low": [short_number(piece.low) for piece in pieces],
            "high": [short_number(piece.high) for piece in pieces],
        }
    return found


def short_number(value: float) -> float | None:
    """Five digits, which is more than can be seen."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _frontier(rows: Sequence[Mapping[str, Any]], key: str, look: Look) -> dict[str, Any]:
    """L0 against the numbers of ``key``, a line for each family."""
    drawn = [row for row in rows if has_place(row, key)]
    lines = []
    for family in look.families(drawn):
        first = family[0]
        lines.append(
            {
                "name": "",
                "look": "points",
                "marker": look.marker_of(first),
                "light": look.color_of(first),
                "dark": look.color_of(first, dark=True),
                "tags": _tags(look, first),
                "x": [short_number(row["l0"]) for row in family],
                "y": [short_number(row[key]) for row in family],
                "labels": [printable(look.label_of(row)) for row in family],
                "hover": [_hover(row, look) for row in family],
            }
        )
    return over_l0(key, [row["l0"] for row in drawn], lines)


def over_l0(key: str, xs: Sequence[float], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The chart of ``key`` over L0, which is ``xs``, as pages have it."""
    return {
        "title": f"{PANELS[key]} over L0", "log": False, "xlog": spreads(xs), "lower": None, "upper": None,
        "note": "", "format": "fraction", "lines": lines,
        "xlabel": "L0, features per token" + (", on a logarithmic scale" if spreads(xs) else ""),
    }  # fmt: skip


def _hover(row: Mapping[str, Any], look: Look) -> str:
    """What is told of the point of ``row``."""
    options = [f"{name} = {value_of(row[option])}" for option, name in look.names.items()]
    numbers = [f"L0 {number(row['l0'])}"]
    numbers += [f"{PANELS[key]} {fraction(row[key])}" for key in PANELS if has_place(row, key)]
    if row["dead_features"] is not None:
        numbers.append(f"{count(row['dead_features'])} dead")
    return printable("\n".join([str(row["name"]), *options, ", ".join(numbers)]), keep="\n")


def _tags(look: Look, row: Mapping[str, Any]) -> list[str]:
    """By which entries of the legend a line is switched off."""
    return [f"{option}={key_of(row[option])!r}" for option in (look.color, look.marker) if option is not None]


def _legend(look: Look) -> Iterator[dict[str, Any]]:
    gray = {"light": "#707070", "dark": "#a8a8a8"}
    for option, values in ((look.color, look.colors), (look.marker, look.markers)):
        if option is None:
            continue
        entries = []
        for value in values:
            style = _own(look.colors[value]) if option == look.color else gray | {"marker": look.markers[value]}
            entries.append(
                {"name": printable(value_of(value)), "look": "points", "tag": f"{option}={value!r}", **style}
            )
        yield {"what": printable(look.names[option]), "entries": entries}


def _curves(run: RunFolder, rows: Mapping[str, Mapping[str, Any]], look: Look) -> Iterator[dict[str, Any]]:
    """Each metric of training, a line for each SAE."""
    most = max(_MOST_OF_A_SWEEP // len(run.saes), 24)
    found: dict[str, tuple[Panel, list[dict[str, Any]]]] = {}
    for sae in run.saes.values():
        row = rows[sae.name]
        colors = {"light": look.color_of(row), "dark": look.color_of(row, dark=True), "tags": _tags(look, row)}
        for panel in panels_of(sae, most):
            if panel.setting or not panel.lines or panel.lines[0].look != "line":
                continue
            title = "Dead features" if panel.title.startswith("Dead") else panel.title.partition(" (")[0]
            line = {**_line(panel.lines[0]), **colors, "name": printable(sae.name), "end": ""}
            line.pop("low", None), line.pop("high", None)  # of many on top of each other, bands would hide lines
            found.setdefault(title, (panel, []))[1].append(line)
    for title, (panel, lines) in found.items():
        values = [value for line in lines for value in line["y"] if value is not None]
        log = panel.log and bool(values) and min(values) > 0
        upper = panel.upper if panel.upper == 1.0 and title == "Explained variance" else None
        lower = panel.lower if upper == 1.0 or not log else None
        yield {**_frame(panel, lines), "title": title, "log": log, "lower": lower, "upper": upper, "note": ""}


def _table(run: RunFolder, rows: Sequence[Mapping[str, Any]], options: Mapping[str, str]) -> dict[str, Any]:
    """The numbers of every SAE, which lead to its own page where there is one."""
    columns = [*options, *(key for key in SHOWN if any(row[key] is not None for row in rows))]
    head = ["SAE", *options.values(), *(SHOWN[key][0] for key in columns if key in SHOWN), "status"]
    lines = []
    for row in rows:
        home = run.saes[row["name"]].home
        page = Path(home.name) / "curves.html"
        cells = [str(row["name"]), *(_cell(row[key], SHOWN.get(key)) for key in columns), str(row["status"])]
        keys = [row["name"], *(row[key] for key in columns), row["status"]]
        plain = all(character.isalnum() or character in "._=+-" for character in home.name)
        lines.append(
            {
                "cells": [printable(cell) for cell in cells],
                "keys": [key if isinstance(key, (int, float, str)) else None for key in keys],
                "link": page.as_posix() if plain and (run.folder / page).is_file() else None,
            }
        )
    return {"head": [printable(name) for name in head], "rows": lines}


def _cell(value: Any, shown: tuple[str, str] | None) -> str:
    if value is None:
        return "-"
    return format(value, shown[1]) if shown is not None else value_of(value)
