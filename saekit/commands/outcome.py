"""What a terminal shows when a run is done: the same after `saekit train` and after the demo."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from saekit.reports.table import run_table

if TYPE_CHECKING:
    from saekit.runs.results import SweepResult, TrainResult

__all__ = ["show_files", "show_result", "show_table"]


def show_result(result: TrainResult | SweepResult, console: Console, others: tuple[tuple[str, Path], ...] = ()) -> None:
    """What was trained on what, how good it is, and where it lies."""
    show_table(result, console)
    show_files(result, console, others)


def show_table(result: TrainResult | SweepResult, console: Console) -> None:
    """What was trained on what, and how good it is."""
    console.print()
    console.print(run_table(result.folder, console))


def show_files(
    result: TrainResult | SweepResult, console: Console, others: Sequence[tuple[str, str | Path]] = ()
) -> None:
    """Where everything lies: pictures, ``others``, and the folder, which is the last line."""
    several = hasattr(result, "results")
    lines = [("pictures" if several else "training curves", str(path)) for path in result.pictures]
    lines += [(name, str(path)) for name, path in others]
    lines += [] if several else [("SAE", str(result.folder / "sae"))]
    lines += [("see it again", f"saekit show {shlex.quote(str(result.folder))}")]
    width = max(len(name) for name, _ in lines)
    said = ""
    console.print()
    for name, text in lines:
        console.print(f"{name if name != said else '':{width}}  {text}", highlight=False, markup=False, soft_wrap=True)
        said = name
    kind = "sweep" if several else "run"
    console.print(f"{kind} folder: {result.folder}", highlight=False, markup=False, soft_wrap=True)
