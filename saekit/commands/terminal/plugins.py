"""``saekit plugins``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from saekit.errors import UnknownKeyError

__all__ = ["plugins"]


def plugins(
    entry: Annotated[str | None, typer.Argument(help="KIND:KEY shows that plugin's options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List every plugin, or one plugin's options with types, defaults and explanations."""
    from saekit.plugins import listing
    from saekit.plugins.manager import default_manager

    manager = default_manager()
    if entry is None:
        data: Any = listing.overview(manager)
        typer.echo(json.dumps(data, indent=2) if as_json else listing.table(data))
        return
    kind, colon, key = entry.partition(":")
    if not colon:
        raise UnknownKeyError(f"{entry!r} is not KIND:KEY, such as lr_schedules:cosine. `saekit plugins` lists them")
    detail = listing.detail(manager.get(listing.kind_named(kind), key))
    typer.echo(json.dumps(detail, indent=2) if as_json else listing.detail_text(detail))
