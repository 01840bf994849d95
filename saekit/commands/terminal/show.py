"""``saekit show``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["EXAMPLES", "show"]

EXAMPLES = """
    saekit show runs/RUN
    saekit show runs/RUN --open
"""


def show(
    folder: Annotated[
        str, typer.Argument(help="A run folder, a sweep's, that of a saved SAE, or one of several runs.")
    ],
    draw: Annotated[bool, typer.Option("--draw", help="Draw the pictures anew, from the metrics as they are.")] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open the pictures in a browser.")] = False,
) -> None:
    """Show what there is of a run: its numbers, its pictures, its best features, and what to type next."""
    from rich.console import Console

    from saekit.commands.show import show as shown

    shown(folder, Console(width=None if sys.stdout.isatty() else 1000), draw=draw, open_it=open_it)
