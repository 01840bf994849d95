"""``saekit cache write`` and ``saekit cache verify``."""

from __future__ import annotations

import json
import os
import shlex
from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import ConfigFile, Overrides, examples, run_config, source_of
from saekit.commands.terminal.ending import interruptible

__all__ = ["EXAMPLES", "app"]

_WRITE = """
    saekit cache run.toml
    saekit cache write run.toml activations.cache.folder=activations activations.cache.tokens=100_000_000
"""
_VERIFY = """
    saekit cache verify activations
    saekit cache verify activations --quick
"""
EXAMPLES = f"{_WRITE.rstrip()}{_VERIFY}"


class _DefaultCommand(typer.core.TyperGroup):
    """``saekit cache run.toml`` means ``saekit cache write run.toml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["write", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultCommand, no_args_is_help=True, rich_markup_mode=None, help="Write activations to disk, or check them."
)


@app.command("write", epilog=examples(_WRITE))
def write(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Write the model's activations on the training text to disk (also: saekit cache CONFIG).

    CONFIG is that of the training run that will read them; what is written is said by activations.cache. Interrupted,
    it goes on after the last finished shard when it is called again.
    """
    from saekit.commands import jobs
    from saekit.distributed.launched import Launched

    checked = run_config(*source_of(config, overrides), writes_cache=True)
    folder = checked.activations.cache.folder
    with interruptible("interrupted; finished shards are kept, and the same command goes on after them"):
        manifest = jobs.cache_activations(checked)
    if Launched.here(os.environ).rank:  # the first of several processes says it
        return
    typer.echo(f"{manifest.rows:,} activations of {', '.join(s.site.name for s in manifest.sites)} in {folder}")
    source = f'activations.source={{name="cached", folder={json.dumps(folder)}}}'
    typer.echo(f"train on them with: {shlex.quote(source)}")


@app.command("verify", epilog=examples(_VERIFY))
def verify(
    folder: Annotated[str, typer.Argument(help="The folder that `saekit cache` wrote.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and a sample of each file, not all of it.")] = False,
) -> None:
    """Compare every file of a cache with its checksum."""
    from saekit.data.cache.manifest import Manifest, verify_cache
    from saekit.files.paths import as_path
    from saekit.progress import ProgressDisplay

    size = Manifest.load(as_path(folder)).nbytes
    with ProgressDisplay(size, doing="verifying", unit="bytes") as progress:
        manifest = verify_cache(as_path(folder), full=not quick, report=progress.update)
    shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
    typer.echo(f"{folder}: {shards}, {manifest.rows:,} activations per site, all as written")
