"""``saekit config``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import MaybeConfigFile, Overrides, completed, source_of
from saekit.errors import ConfigError

__all__ = ["EXAMPLES", "config"]

EXAMPLES = """
    saekit config > run.toml
    saekit config sae.name=topk training.training_tokens=10_000_000 > run.toml
    saekit config run.toml training.lr=1e-3 --format json
    saekit config --of pretokenize --format yaml
    saekit config --recipes
    saekit config --recipe gpt2-small-residual > run.toml
"""
_KINDS = ("train", "pretokenize")
_FORMS = ("toml", "yaml", "json")


def config(
    config: MaybeConfigFile = None,
    overrides: Overrides = None,
    form: Annotated[
        str, typer.Option("--format", help="toml, yaml or json.", autocompletion=lambda: list(_FORMS))
    ] = "toml",
    of: Annotated[
        str, typer.Option("--of", help="train or pretokenize.", autocompletion=lambda: list(_KINDS))
    ] = "train",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Print this recipe, a configuration of what people train, with changes on top.",
            autocompletion=lambda ctx, incomplete: completed("complete_recipe", ctx, incomplete),
        ),
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes.")] = False,
) -> None:
    """Print every option with its default and an explanation; or check a file, or options, and print what they mean; or
    print a recipe.

    Explanations are in TOML alone.
    """
    from saekit.config import PretokenizeConfig, TrainConfig
    from saekit.config.files import apply_overrides, commented_toml, dump_config, load_config

    if of not in _KINDS:
        raise ConfigError([("--of", f"must be {' or '.join(_KINDS)}, found {of!r}")])
    if form not in _FORMS:
        raise ConfigError([("--format", f"must be toml, yaml or json, found {form!r}")])
    if list_recipes or recipe is not None:
        if of != "train":
            raise ConfigError([("--of", f"is {of!r}, and recipes are configurations of train: leave it out")])
        if list_recipes and recipe is not None:
            raise ConfigError([("--recipes", "lists all, and --recipe prints one; give one of them")])
        from saekit.config.recipes import printed

        typer.echo(printed(recipe, [] if config is None else [config, *(overrides or ())], form), nl=False)
        return
    kind: Any = TrainConfig if of == "train" else PretokenizeConfig
    source, given = ({}, []) if config is None else source_of(config, overrides)
    if not source and of == "pretokenize":  # of which one option is required
        source = apply_overrides({}, given, kind=kind)
        source, given = {"folder": "contexts"} | source if "hub_repo_id" not in source else source, []
    checked = load_config(source, given, kind=kind)
    typer.echo(commented_toml(checked) if form == "toml" else dump_config(checked, form, full=True), nl=False)
