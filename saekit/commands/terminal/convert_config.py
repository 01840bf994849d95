"""``saekit convert-config``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["EXAMPLES", "convert_config"]

EXAMPLES = """
    saekit convert-config runner_cfg.json run.toml
    saekit convert-config checkpoints/abc/cfg.json run.toml
    saekit convert-config runner_cfg.json --json
"""


def convert_config(
    source: Annotated[
        str, typer.Argument(help="What another library saved of a run's options: a JSON, YAML or TOML file.")
    ],
    target: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="The TOML file to write, which must be new; else it is printed."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: the options, and what became of every key.")
    ] = False,
) -> None:
    """Turn the configuration of another library's run, as sae-lens 2 to 6 save it, into one that means the same.

    What is called otherwise here, what is left out and why, and what saekit does not do goes to standard error.
    """
    import json
    import sys

    import attrs

    from saekit.config.files import read_table
    from saekit.files.paths import as_path
    from saekit.pretrained.converting import convert_config as converted_config
    from saekit.pretrained.converting import write_new

    converted = converted_config(read_table(as_path(source)))
    text = json.dumps(attrs.asdict(converted), indent=2) + "\n" if as_json else converted.toml
    if target is None:
        typer.echo(text, nl=False)
    else:
        write_new(target, text)
    for line in () if as_json else converted.report():
        typer.echo(line, file=sys.stderr)
