"""``saekit train``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import Overrides, source_of
from saekit.commands.terminal.ending import complain, interruptible
from saekit.errors import ConfigError

__all__ = ["train"]


def train(
    config: Annotated[
        str | None,
        typer.Argument(help="A TOML, YAML or JSON file; or the first of the options, if the rest are the defaults."),
    ] = None,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--grid", help="section.option=value,value,...: train an SAE for each, on one run of the model."),
    ] = None,
    run: Annotated[str | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="With --resume: an option that may differ from before.")
    ] = None,
) -> None:
    """Train an SAE as a configuration file says, or one for each point of a grid; or go on with a run."""
    if run is None and (config is None or allow):
        missing = "a configuration file is missing" if config is None else "--allow goes with --resume"
        raise ConfigError(f"{missing}: saekit train run.toml, or saekit train --resume RUN")
    if run is not None and axes:
        raise ConfigError("--grid starts a new run, and --resume goes on with one; give one of them")
    if run is not None:
        from saekit.files.paths import as_path
        from saekit.runs.place import check_is_run

        check_is_run(as_path(run))  # before anything is imported that is for runs
    source, given = ({}, []) if config is None else source_of(config, overrides)
    from saekit.config.files import load_config, parse_grid

    if run is None:
        wanted: Any = load_config(source, given)  # before torch is imported, so that mistakes show at once
    if axes:
        from saekit.runs.sweep import grid

        wanted = grid(wanted, parse_grid(axes))
    from saekit.commands import jobs

    with interruptible():
        _report(jobs.train(wanted) if run is None else jobs.resume(run, source or None, given, allow=allow or ()))


def _report(result: Any) -> None:
    """What came of a run or a sweep; exits with 1 if some of its SAEs diverged."""
    if not hasattr(result, "summary"):
        for name, value in sorted(result.metrics.items()):
            if name.startswith("evals/"):
                typer.echo(f"{name.removeprefix('evals/'):24} {value:.6g}")
        typer.echo(f"run folder: {result.folder}")
        return
    from rich.console import Console

    from saekit.runs.summary import summary_table

    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(summary_table(result.summary, console))
    typer.echo(f"sweep folder: {result.folder}")
    for name, why in result.diverged.items():
        complain(f"{name} diverged: {why}")
    if result.diverged:
        raise typer.Exit(1)
