"""Arguments that several commands take."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

__all__ = ["ConfigFile", "Overrides", "source_of"]

ConfigFile = Annotated[
    str, typer.Argument(help="A TOML, YAML or JSON file; or the first of the options, if the rest are the defaults.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Options to change, as section.option=value.")]


def source_of(config: str, overrides: list[str] | None) -> tuple[Any, list[str]]:
    """What to load, and the overrides on top; ``a.b=value`` in the place of the file means that there is none."""
    given = overrides or []
    no_file = "=" in config and not os.path.exists(config)  # noqa: PTH110 - pathlib would be imported for it alone
    return ({}, [config, *given]) if no_file else (config, given)
