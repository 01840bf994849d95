"""What came of a run or a sweep, as a table for people."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.plugins.text import printable
from saekit.reports.folder import RunFolder, SAERun, read_run
from saekit.reports.numbers import count, duration, fraction, number
from saekit.runs.sweep import short_names, value_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["SHOWN", "banner", "run_table", "sae_table", "summary_table"]

_MAIN = {
    "explained variance": ("evals/explained_variance", "metrics/explained_variance", fraction),
    "L0, features per token": ("evals/l0", "metrics/l0", number),
    "CE recovered": ("evals/ce_recovered", None, fraction),
    "CE clean | with SAE | ablated": (None, None, fraction),
    "loss": (None, "losses/overall_loss", number),
    "dead features": (None, "sparsity/dead_features", count),
}
"""What a table says first: the metric of evals, that of training, and how numbers are written."""
_LOSSES = ("evals/ce_loss_without_sae", "evals/ce_loss_with_sae", "evals/ce_loss_with_ablation")
_TOLD = frozenset(
    ["explained_variance", "l0", "ce_recovered", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation",
     "mse", "l1", "cosine_similarity", "l2_norm_in", "l2_norm_out", "l2_ratio", "never_fired", "dense_features",
     "n_tokens"]
)  # fmt: skip
"""What the built-in eval measures; what others measure is told at the end."""
_WORDS = {
    "silent_features": "features silent on that text", "relative_reconstruction_bias": "relative reconstruction bias",
    "ce_recovered_from_mean": "CE recovered from the mean", "ce_loss_with_mean_ablation": "CE with the mean",
    "kl_div_with_sae": "KL divergence", "kl_div_with_ablation": "KL with zeros", "kl_div_score": "KL score",
    "top1_agreement": "top-1 agreement",
}  # fmt: skip
"""What those of the built-in evals are called that are told at the end."""
SHOWN = {
    "l0": ("L0", ".4g"),
    "explained_variance": ("EV", ".3f"),
    "ce_recovered": ("CE rec.", ".3f"),
    "mse": ("mse", ".4g"),
    "dead_features": ("dead", ",.0f"),
    "tokens": ("tokens", ",.0f"),
}
"""How a table for people shows the columns of numbers."""


def run_table(run: str | Path | RunFolder, console: Console | None = None) -> RenderableType:
    """What was trained on what, and how good it is: of a run folder, of a sweep's, or of one SAE's in that.

    For :mod:`rich` to print; of a sweep no wider than ``console``.  :class:`saekit.errors.PlaceError` where there is no
    run.
    """
    from rich.console import Console, Group

    run = run if isinstance(run, RunFolder) else read_run(run)
    if run.sweep:
        from saekit.reports.sweep import summary_of

        return summary_table(summary_of(run).rows, console or Console())
    return Group(banner(run.alone), sae_table(run.alone))


def banner(sae: SAERun) -> RenderableType:
    """Two lines: what was trained, and on what."""
    from rich.text import Text

    first = Text(printable(sae.what), style="bold")
    if sae.where:
        first.append(f" on {printable(sae.where)}", style="not bold")
    total, steps = sae.options.total_tokens, sae.step
    of = f" of {count(total)}" if total and sae.tokens < total else ""
    parts = [
        f"{count(sae.tokens)}{of} tokens" + (f" of {printable(sae.text)}" if sae.text else ""),
        f"{steps:,} step{'s' * (steps != 1)}" if steps else "",
        duration(sae.history.seconds) if sae.history.seconds else "",
    ]
    return Text("\n").join([first, Text(", ".join(part for part in parts if part), style="dim")])


def sae_table(sae: SAERun) -> Table:
    """The main numbers of one SAE: on held-out text, and in the last steps of training that were logged."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    rows = list(_rows(sae))
    measured = any(row[1] for row in rows)
    table.add_column("", no_wrap=True)
    if measured:
        table.add_column("held out", justify="right", no_wrap=True)
    table.add_column("in training", justify="right", no_wrap=True)
    for name, held_out, trained in rows:
        table.add_row(Text(name), *([Text(held_out)] if measured else []), Text(trained))
    return table


def _rows(sae: SAERun) -> Iterator[tuple[str, str, str]]:
    history = sae.history
    for name, (measured, trained, text) in _MAIN.items():
        cells = ["" if key is None else _cell_of(history.latest.get(key), text) for key in (measured, trained)]
        if name.startswith("CE clean"):
            losses = [history.get(key) for key in _LOSSES]
            cells[0] = " | ".join("-" if one is None else fraction(one) for one in losses) if any(losses) else ""
        elif name == "dead features" and cells[1] and sae.d_sae:
            cells[1] += f" of {sae.d_sae:,}"
        if any(cells):
            yield name, cells[0], cells[1]
    others = [name for name in history.latest if name.startswith("evals/") and name.split("/")[1] not in _TOLD]
    errors = {name for name in history.latest if name.endswith("_se") and name.removesuffix("_se") in history.latest}
    for name in [name for name in others if name not in errors][:20]:
        own = name.removeprefix("evals/")
        yield printable(_WORDS.get(own, own.replace("_", " "))), _cell_of(history.latest[name], number), ""


def _cell_of(value: float | None, text: Any) -> str:
    """A metric that is no number, or an infinite one, is the same in files of JSON."""
    return "" if value is None else "not finite" if not math.isfinite(value) else str(text(value))


def summary_table(rows: Sequence[Mapping[str, Any]], console: Console) -> Table:
    """The rows of ``summary.csv`` for people, no wider than ``console``.

    Columns that say nothing are left out, and of a name that is made of the options all but its number.
    """
    options = short_names(column for column in rows[0] if column not in SHOWN and column not in ("name", "status"))
    trained = [row for row in rows if row["status"] != "diverged"]
    numbers = [column for column in SHOWN if any(row[column] is not None for row in trained)]
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
        table.add_column(SHOWN[column][0], justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(row, column) for column in numbers]
        if row["status"] == "diverged":
            cells[0] = row["status"]
        table.add_row(Text(row["name"]), *(Text(value_text(row[column])) for column in options), *cells)
    return table


def _short_name(name: str, options: Collection[str]) -> str:
    number, _, rest = name.partition("_")
    return number if options and number.isdecimal() and "=" in rest else name


def _cell(row: Mapping[str, Any], column: str) -> str:
    return "-" if row[column] is None else format(row[column], SHOWN[column][1])
