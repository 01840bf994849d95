"""``saekit watch``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["EXAMPLES", "watch"]

EXAMPLES = """
    saekit watch runs/RUN
    saekit watch runs/RUN --every 60 >> watched.txt
"""


def watch(
    folder: Annotated[str, typer.Argument(help="The run folder, which may be still to come.")],
    every: Annotated[
        float | None, typer.Option("--every", min=0.1, help="Seconds between two looks; without a terminal, lines.")
    ] = None,
) -> None:
    """Watch a run that trains in another process, or on another machine over a shared disk, until it ends."""
    from rich.console import Console

    from saekit.commands.watch import watch as watched

    try:
        watched(folder, Console(width=None if sys.stdout.isatty() else 1000), every=every)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
