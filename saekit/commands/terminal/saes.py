"""``saekit saes``: ``list``, ``info``, ``convert`` and ``verify``."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from typing import Annotated

import typer

from saekit.commands.terminal.arguments import completed, examples
from saekit.errors import ConfigError

__all__ = ["EXAMPLES", "app"]

_LIST = """
    saekit saes list
    saekit saes list --model gemma-2-2b --hook blocks.12.hook_resid_post
    saekit saes list gpt2
    saekit saes list --model gemma --hook 12
    saekit saes list --hook resid_post
    saekit saes list --loader gemma_3 --json
"""
_INFO = """
    saekit saes info gpt2-small-res-jb
    saekit saes info gemma-scope-2b-pt-res --hook 12
    saekit saes info gpt2-small-res-jb blocks.8.hook_resid_pre
"""
_CONVERT = """
    saekit saes convert runs/first/sae elsewhere --to sae_lens
    saekit saes convert gpt2-small-res-jb:blocks.8.hook_resid_pre layer_8 --to dictionary_learning
"""
_VERIFY = """
    saekit saes verify runs/first/sae
"""
EXAMPLES = f"{_LIST.rstrip()}{_INFO.rstrip()}{_CONVERT.rstrip()}{_VERIFY}"

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Find published SAEs; convert and verify saved ones."
)

_Files = Annotated[
    list[str] | None,
    typer.Option(
        "--releases", help="A TOML file of releases, beside those of SAEKIT_RELEASES; several times for several."
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list", epilog=examples(_LIST))
def list_releases(
    of: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="As --model.",
            autocompletion=lambda ctx, incomplete: completed("complete_released_model", ctx, incomplete),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Releases of this language model; a part of its name will do.",
            autocompletion=lambda ctx, incomplete: completed("complete_released_model", ctx, incomplete),
        ),
    ] = None,
    hook: Annotated[
        str | None,
        typer.Option(help="SAEs that read this hook: blocks.8.hook_resid_pre, or a part of it: resid_pre, 8."),
    ] = None,
    loader: Annotated[
        str | None,
        typer.Option(
            help="Releases in the format of this loader.",
            autocompletion=lambda ctx, incomplete: completed("complete_released_loader", ctx, incomplete),
        ),
    ] = None,
    releases: _Files = None,
    as_json: _Json = False,
) -> None:
    """List the releases that SAE.from_pretrained knows by name."""
    from saekit.commands.saes import listed, table
    from saekit.pretrained.catalog import Catalog

    if of is not None and model is not None:
        raise ConfigError([("--model", f"is {model!r}, beside {of!r}, which is a model, too; give one")])
    rows = listed(Catalog(releases or ()), model=model or of, hook=hook, loader=loader)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, columns))
    if hook is not None and not as_json and sys.stdout.isatty():
        typer.echo(f"The SAEs of one: saekit saes info {rows[0]['release']} --hook {shlex.quote(hook)}")


@app.command("info", epilog=examples(_INFO))
def show_release(
    release: Annotated[
        str,
        typer.Argument(
            help="The name of a release.",
            autocompletion=lambda ctx, incomplete: completed("complete_release", ctx, incomplete),
        ),
    ],
    sae_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="One SAE of it, by its id.",
            autocompletion=lambda ctx, incomplete: completed("complete_released_sae", ctx, incomplete),
        ),
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="Only the SAEs that read this hook; a part of its name will do: resid_pre, 8.")
    ] = None,
    releases: _Files = None,
    as_json: _Json = False,
) -> None:
    """Show what is known of a release and its SAEs, or of one of them, and how it is loaded."""
    from saekit.commands.saes import found_release, info, info_text
    from saekit.pretrained.catalog import find_sae

    found = found_release(release, releases or ())
    if sae_id is not None and hook is not None:
        raise typer.BadParameter("an ID names one SAE already: leave --hook out", param_hint="--hook")
    data = info(found, None if sae_id is None else find_sae(found, sae_id), hook=hook)
    typer.echo(json.dumps(data, indent=2) if as_json else info_text(data))


@app.command("convert", epilog=examples(_CONVERT))
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder or file of an SAE, or RELEASE:ID of a published one; RELEASE, if it has one alone.",
            metavar="SOURCE",
        ),
    ],
    target: Annotated[str, typer.Argument(help="The folder to write; files that are there stay.", metavar="FOLDER")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="The format: saekit, or the key of the loader that reads it (sae_lens, sparsify, ...)."
        ),
    ],
    loader: Annotated[
        str | None, typer.Option(help="The loader that reads the source, where its files could be several formats.")
    ] = None,
    releases: _Files = None,
) -> None:
    """Write an SAE in the format of another library, as far as that has a place for all of it."""
    from saekit.commands.saes import converted

    typer.echo(converted(source, target, to, loader, releases or ()))


@app.command("verify", epilog=examples(_VERIFY))
def verify(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder of an SAE that saekit saved, or RELEASE:ID, or RELEASE, of a published one.",
            metavar="SOURCE",
        ),
    ],
    loader: Annotated[str | None, typer.Option(help="The loader that reads it, where it is of another format.")] = None,
    releases: _Files = None,
) -> None:
    """Compare an SAE with what it was when it was saved: checksums, and what it computes with the probe beside it."""
    from saekit.commands.saes import verified

    typer.echo(verified(source, loader, releases or ()))
