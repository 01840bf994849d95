"""What ``saekit eval`` shows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.measuring import Evaluation, Evaluations, json_text
from saekit.plugins.text import printable

__all__ = ["evaluation_table", "measured_on", "show_evaluations"]

_APART = (
    "Numbers of one table cannot be compared with those of another: the contexts, or the models, are not the same. To "
    "compare SAEs of one model, name one text for all (dataset=..., --dataset), and one context size if these differ"
)


def show_evaluations(found: Evaluation | Evaluations, *, as_json: bool = False) -> None:
    """A table of values and standard errors, with what was measured below it; or JSON, for programs.

    SAEs that were measured on other contexts, or in another model, have a table of their own.
    """
    found = found if isinstance(found, Evaluations) else Evaluations({str(found.about.get("sae", "SAE")): found})
    if as_json:
        print(json_text(found.to_dict()))
        return
    console = Console(width=None if sys.stdout.isatty() else 1000)
    parts = found.by_text()
    for part in parts:
        console.print(evaluation_table(part))
        for line in dict.fromkeys(measured_on(one.about) for one in part.values()):
            console.print(Text(printable(line), style="dim"), soft_wrap=True)
        if len(parts) > 1:
            console.print()
    if len(parts) > 1:
        console.print(Text(printable(_APART)), soft_wrap=True)
    if files := [str(one.file) for one in found.values() if one.file is not None]:
        console.print(Text(printable(f"Written: {', '.join(files)}")), soft_wrap=True)


def evaluation_table(found: Evaluations) -> Table:
    """A row for each number, with what it is in words, and a column for each SAE."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", style="dim")
    for name in found:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for name, *cells in found.rows():
        words = next(one for one in found.values() if name in one.values).measure(name).label
        table.add_row(Text(printable(name)), Text(printable(words)), *map(Text, cells))
    return table


def measured_on(about: Mapping[str, Any]) -> str:
    """The text, the model and the tokens that count, in a line, of :attr:`~saekit.measuring.Evaluation.about`."""
    if "n_contexts" not in about:
        return "of the SAE alone, without a model and a text"
    used, of = about.get("tokens_used"), about.get("tokens_of")
    tokens = f"{used:,} of {of:,} tokens" if isinstance(used, int) and isinstance(of, int) else "all tokens"
    text = f"{about['n_contexts']:,} contexts of {about['context_size']:,} tokens of {about['dataset']}"
    text += ", held out from training" if about.get("held_out") else ""
    first = about.get("drawn_from_first_documents")
    text += f", drawn from its first {first:,} documents" if first else ""
    means = about.get("mean_ablation_contexts")
    ablation = f"; means over the first {means:,} contexts" if means else ""
    return f"{tokens} of {text}; model {about['model']}; ± standard error by bootstrap over contexts{ablation}"
