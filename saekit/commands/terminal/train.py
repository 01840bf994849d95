"""``saekit train``."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from saekit.commands.terminal.arguments import MaybeConfigFile, Overrides, run_config, run_configs, source_of
from saekit.commands.terminal.ending import complain, interruptible
from saekit.errors import ConfigError

__all__ = ["EXAMPLES", "train"]

EXAMPLES = """
    saekit train run.toml
    saekit train run.toml sae.name=topk training.lr=1e-3
    saekit train model.name=gpt2 site.hook_name=blocks.8.hook_resid_pre
    saekit train run.toml --grid sae.l1_coefficient=1,5,10
    saekit train --resume runs/RUN
"""
_FIRST = """

To begin with:

  saekit demo                        a first SAE, on a model and a text that come with saekit; nothing is downloaded
  saekit config > run.toml           every option with its default and an explanation; then: saekit train run.toml
  saekit train sae.name=topk         no file, but options; the others keep their defaults
"""


def train(
    config: MaybeConfigFile = None,
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
        # Trained by defaults alone, an empty $CONFIG in a script would leave a run that looks like what was meant.
        missing, more = (
            ("a configuration file is missing", _FIRST) if config is None else ("--allow goes with --resume", "")
        )
        raise ConfigError(f"{missing}: saekit train run.toml, or saekit train --resume RUN{more}")
    if run is not None and axes:
        raise ConfigError("--grid starts a new run, and --resume goes on with one; give one of them")
    if run is not None:
        from saekit.files.paths import as_path
        from saekit.runs.place import check_is_run

        check_is_run(as_path(run))  # before anything is imported that is for runs
    source, given = ({}, []) if config is None else source_of(config, overrides)
    if run is None:  # before torch is imported, so that mistakes show at once
        wanted: Any = run_configs(source, given, axes) if axes else run_config(source, given)
    from saekit.commands import jobs
    from saekit.distributed.launched import Launched

    with interruptible():
        result = jobs.train(wanted) if run is None else jobs.resume(run, source or None, given, allow=allow or ())
        if Launched.here(os.environ).rank == 0:
            _show(result)


def _show(result: Any) -> None:
    """What came of a run or a sweep; exits with 1 if some of its SAEs diverged."""
    from rich.console import Console

    from saekit.commands.outcome import show_result

    show_result(result, Console(width=None if sys.stdout.isatty() else 1000))
    diverged = getattr(result, "diverged", {})
    for name, why in diverged.items():
        complain(f"{name} diverged: {why}")
    if diverged:
        raise typer.Exit(1)
