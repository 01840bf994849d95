"""``saekit config``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import Overrides
from saekit.errors import ConfigError

__all__ = ["config"]


def config(
    config: Annotated[str | None, typer.Argument(help="Check this file and print it in full.")] = None,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", help="toml, yaml or json.")] = "toml",
    of: Annotated[str, typer.Option("--of", help="train or pretokenize.")] = "train",
) -> None:
    """Print the full default configuration, commented; or check a file and print what it means."""
    from saekit.config import PretokenizeConfig, TrainConfig
    from saekit.config.files import commented_toml, dump_config, load_config

    kinds: dict[str, Any] = {"train": TrainConfig, "pretokenize": PretokenizeConfig}
    if of not in kinds:
        raise ConfigError([("--of", f"must be {' or '.join(kinds)}, found {of!r}")])
    if form not in ("toml", "yaml", "json"):
        raise ConfigError([("--format", f"must be toml, yaml or json, found {form!r}")])
    if config is None and form == "toml":
        typer.echo(commented_toml(of), nl=False)
    else:
        typer.echo(dump_config(load_config(config or {}, overrides or (), kind=kinds[of]), form), nl=False)
