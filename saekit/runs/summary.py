"""What came of a sweep: a file, a table and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.analysis.sweep import plot_sweep
from saekit.files.storage import write_text
from saekit.runs.sweep import short_names, value_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from saekit.runs.session import Member

__all__ = ["summary_table", "write_summary"]

_NUMBERS = {
    "l0": ("evals/l0", "metrics/l0"),
    "explained_variance": ("evals/explained_variance", "metrics/explained_variance"),
    "ce_recovered": ("evals/ce_recovered",),
    "mse": ("evals/mse", "losses/mse_loss"),
    "dead_features": ("sparsity/dead_features",),
}
"""The columns, and the metrics that each is taken from, the first that is there."""
_SHOWN = {
    "l0": ("L0", ".4g"),
    "explained_variance": ("EV", ".3f"),
    "ce_recovered": ("CE rec.", ".3f"),
    "mse": ("mse", ".4g"),
    "dead_features": ("dead", ",.0f"),
    "tokens": ("tokens", ",.0f"),
}
"""How a table for people shows the columns of numbers."""


def write_summary(
    folder: Path, members: Sequence[Member], changed: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Write ``summary.csv`` and ``summary.png`` into ``folder``; returns the rows, one for each SAE."""
    rows = [_row(member, options) for member, options in zip(members, changed, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _in_a_file(value) for name, value in row.items()} for row in rows)
    write_text(folder / "summary.csv", text.getvalue())
    plot_sweep(rows, short_names(changed[0]), folder / "summary.png")
    return list(rows)


def _in_a_file(value: Any) -> Any:
    """Sites by their names, and other lists and tables as JSON, which more can read than Python."""
    if not isinstance(value, (list, Mapping)):
        return value
    text = value_text(value)
    return json.dumps(value) if text == str(value) else text


def _row(member: Member, options: Mapping[str, Any]) -> dict[str, Any]:
    latest = member.latest
    numbers = {
        name: next((latest[source] for source in sources if source in latest), None)
        for name, sources in _NUMBERS.items()
    }
    diverged = member.trainer.diverged
    return {
        "name": member.name,
        **options,
        **(numbers if diverged is None else dict.fromkeys(numbers)),
        "tokens": member.trainer.tokens,
        "status": "trained" if diverged is None else "diverged",
    }


def summary_table(rows: Sequence[Mapping[str, Any]], console: Console) -> Table:
    """The rows of ``summary.csv`` for people, no wider than ``console``.

    Columns that say nothing are left out, and of a name that is made of the options all but its number.
    """
    options = short_names(column for column in rows[0] if column not in _SHOWN and column not in ("name", "status"))
    trained = [row for row in rows if row["status"] == "trained"]
    numbers = [column for column in _SHOWN if any(row[column] is not None for row in trained)]
    if len({row["tokens"] for row in trained}) == 1:
        numbers.remove("tokens")
    named = [{**row, "name": _short_name(str(row["name"]), options)} for row in rows]
    unbounded = console.options.update(max_width=100_000)
    for broken in (False, True):
        table = _table(named, options, numbers, broken=broken)
        if console.measure(table, options=unbounded).maximum <= console.width:
            return table
    for row in named:  # the options under the name
        row["name"] = "\n  ".join([row["name"], *(f"{options[o]}={value_text(row[o])}" for o in options)])
    return _table(named, {}, numbers)


def _table(
    rows: Sequence[Mapping[str, Any]], options: Mapping[str, str], numbers: Sequence[str], *, broken: bool = False
) -> Table:
    """``broken`` writes the options' names in several lines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("SAE", overflow="fold")
    for column, name in options.items():
        heading = Text(name.replace("_", "_\n").replace(".", ".\n") if broken else name)
        numeric = all(isinstance(row[column], (int, float, type(None))) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", vertical="bottom", no_wrap=True)
    for column in numbers:
        table.add_column(_SHOWN[column][0], justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(row, column) for column in numbers]
        if row["status"] != "trained":
            cells[0] = row["status"]
        table.add_row(Text(row["name"]), *(Text(value_text(row[column])) for column in options), *cells)
    return table


def _short_name(name: str, options: Collection[str]) -> str:
    number, _, rest = name.partition("_")
    return number if options and number.isdecimal() and "=" in rest else name


def _cell(row: Mapping[str, Any], column: str) -> str:
    return "-" if row[column] is None else format(row[column], _SHOWN[column][1])
