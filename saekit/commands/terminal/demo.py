"""``saekit demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from saekit.commands.terminal.arguments import Overrides
from saekit.commands.terminal.ending import interruptible

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = """
    saekit demo
    saekit demo sae.d_sae=2048 training.training_tokens=3_000_000 --folder my-demo
"""


def demo(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where the run folder goes.")] = "saekit-demo",
) -> None:
    """Train an SAE on the embedded model and Python's own sources, offline, and show what it found."""
    from saekit.commands.demo import demo as shown

    with interruptible():
        shown(folder, overrides or ())
