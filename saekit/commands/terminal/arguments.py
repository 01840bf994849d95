"""Arguments that several commands take."""

from __future__ import annotations

import inspect
import os
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saekit.config import TrainConfig

__all__ = [
    "ConfigFile",
    "MaybeConfigFile",
    "Overrides",
    "completed",
    "examples",
    "run_config",
    "run_configs",
    "source_of",
]


def completed(what: str, ctx: typer.Context, incomplete: str) -> list[str]:
    """What the TAB key offers, by the function of :mod:`saekit.commands.terminal.completing` of that name.

    That is imported when somebody presses it.  Where it is handed over, it stands in a lambda: typer asks for the types
    of every function with types, at every start, which takes milliseconds.
    """
    from saekit.commands.terminal import completing

    offered: list[str] = getattr(completing, what)(ctx, incomplete)
    return offered


_FILE = typer.Argument(
    help="A TOML, YAML or JSON file; or the first of the options, if the rest are the defaults.",
    autocompletion=lambda ctx, incomplete: completed("complete_config", ctx, incomplete),
)
ConfigFile = Annotated[str, _FILE]
MaybeConfigFile = Annotated[str | None, _FILE]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Options to change, as section.option=value.",
        autocompletion=lambda ctx, incomplete: completed("complete_config", ctx, incomplete),
    ),
]


def examples(lines: str) -> str:
    """The end of a help text: commands as they are typed, which no console may wrap anew."""
    return f"Examples:\n\n\b\n{textwrap.indent(inspect.cleandoc(lines), '  ')}"


def source_of(config: str, overrides: list[str] | None) -> tuple[Any, list[str]]:
    """What to load, and the overrides on top; ``a.b=value`` in the place of the file means that there is none."""
    given = overrides or []
    option = "=" in config or any(word.startswith("=") for word in given[:1])  # `a.b = value` is told to be one word
    no_file = option and not os.path.exists(config)  # noqa: PTH110 - pathlib would be imported for it alone
    return ({}, [config, *given]) if no_file else (config, given)


def run_config(source: Any, overrides: list[str], *, writes_cache: bool = False) -> TrainConfig:
    """What :func:`source_of` gives, as the configuration of a run that takes nothing from memory.

    One that ``writes_cache`` reads its text, whatever trains on it.
    """
    from saekit.config.files import load_config
    from saekit.runs.from_memory import check_config_names_all

    checked = load_config(source, overrides)
    if writes_cache:
        check_config_names_all(source, overrides)
    else:
        _check_names_all(source, overrides, [checked])
    return checked


def run_configs(source: Any, overrides: list[str], axes: list[str]) -> list[TrainConfig]:
    """Likewise those of a grid with these ``axes`` (``section.option=value,value``)."""
    from saekit.config.files import load_config, parse_grid
    from saekit.runs.sweep import grid

    configs = grid(load_config(source, overrides), parse_grid(axes))
    _check_names_all(source, [*overrides, *axes], configs)
    return configs


def _check_names_all(source: Any, given: list[str], configs: list[TrainConfig]) -> None:
    """:class:`ConfigError` where ``source`` does not name what its runs read, and ``given`` does not, either."""
    from saekit.commands.preflight import kinds_read
    from saekit.plugins.manager import default_manager
    from saekit.runs.from_memory import check_config_names_all

    check_config_names_all(source, given, kinds=kinds_read(configs, default_manager()))
