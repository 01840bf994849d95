"""``saekit plan``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from saekit.commands.terminal.arguments import ConfigFile, Overrides, run_config, run_configs, source_of

__all__ = ["EXAMPLES", "plan"]

EXAMPLES = """
    saekit plan run.toml
    saekit plan run.toml --no-load
    saekit plan run.toml --measure
    saekit plan run.toml --grid sae.l1_coefficient=1,5,10
    saekit plan model.name=gpt2 site.hook_name=blocks.8.hook_resid_pre
"""


def _advised(texts: Iterable[str]) -> str:
    """The first option that ``texts`` say is to be written; empty if there is none."""
    return next((found[1] for text in texts if (found := re.search(r"\bwrite ([\w.]+=[^\s,;:]+)", text))), "")


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--grid", help="section.option=value,value,...: of an SAE for each, on one run of the model."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    load: Annotated[
        bool,
        typer.Option(
            "--load/--no-load",
            help="Load the model and time it; or only count: nothing large is downloaded, and the devices of the run "
            "need not be here.",
        ),
    ] = True,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time model.compile and other numbers of contexts in a forward, too, and say what to write where that "
            "pays: a minute or two more.",
        ),
    ] = False,
) -> None:
    """Check a run without training, and say what it needs and how long it takes; exits with 2 if it could not run."""
    from saekit.commands import jobs, preflight
    from saekit.config.files import in_a_file
    from saekit.plugins.manager import default_manager
    from saekit.process_age import process_age

    source, given = source_of(config, overrides)
    checked = run_configs(source, given, axes) if axes else [run_config(source, given)]
    started = process_age()  # a run's process takes as long to come here
    early: list[str] = [] if as_json else preflight.of_plan(checked, default_manager())[1]
    for text in early:  # now, and not when the model has run
        typer.echo(f"problem: {text}")
    sys.stdout.flush()
    found = jobs.plan_after(started, checked, load=load, measure=measure)
    if as_json:
        import attrs

        typer.echo(json.dumps(attrs.asdict(found), indent=2))
    else:
        width = max(map(len, found.facts), default=0)
        for name, text in found.facts.items():
            typer.echo(f"{name:{width}}  {text}")
        for text in found.warnings:
            typer.echo(f"warning: {text}")
        if option := _advised([*found.facts.values(), *found.warnings]):
            typer.echo(f"({option} goes on the command line as it stands; in a file it is {in_a_file(option)})")
        for text in found.problems[len(early) :]:
            typer.echo(f"problem: {text}")
        typer.echo(found.verdict)
    if found.problems:
        raise typer.Exit(2)
