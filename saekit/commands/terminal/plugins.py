"""``saekit plugins``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import completed

__all__ = ["EXAMPLES", "plugins"]

EXAMPLES = """
    saekit plugins
    saekit plugins topk
    saekit plugins lr_schedules
    saekit plugins lr_schedules:cosine
"""


def plugins(
    entry: Annotated[
        str | None,
        typer.Argument(
            help="KEY shows that plugin's options, KIND:KEY where several have that key, KIND those of a kind.",
            autocompletion=lambda ctx, incomplete: completed("complete_plugin", ctx, incomplete),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List every plugin, or one plugin's options with types, defaults and explanations."""
    from saekit.plugins import listing
    from saekit.plugins.manager import default_manager

    manager = default_manager()
    if entry is None or listing.is_kind(entry):
        data: Any = listing.overview(manager, entry)
        typer.echo(json.dumps(data, indent=2) if as_json else listing.table(data, entry))
        return
    detail = listing.detail(listing.found(manager, entry))
    typer.echo(json.dumps(detail, indent=2) if as_json else listing.detail_text(detail))
