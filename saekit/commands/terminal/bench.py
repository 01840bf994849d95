"""``saekit bench``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from saekit.commands.terminal.arguments import completed
from saekit.commands.terminal.ending import interruptible

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = """
    saekit bench
    saekit bench --size 2304x16384 --architecture topk --architecture gated
    saekit bench --device cuda --json
"""


def bench(
    architecture: Annotated[
        list[str] | None,
        typer.Option(
            help="One to time, of saekit or of a plugin; may be given several times. By default standard, topk and "
            "batchtopk.",
            autocompletion=lambda ctx, incomplete: completed("complete_architecture", ctx, incomplete),
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="A width and a number of features, as 512x4096; may be given several times. By default 512x4096 and "
            "768x24576."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps: where to time.")] = "auto",
    seconds: Annotated[
        float, typer.Option(help="About how long it takes; with less, calls are fewer, and at last batches smaller.")
    ] = 120.0,
    rows: Annotated[int, typer.Option(help="Of a batch, at most; fewer where memory or time does not suffice.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: the numbers instead of the table.")] = False,
) -> None:
    """Time steps and inference of SAEs on this machine, and say which way is taken and why.  Needs no model."""
    from rich.console import Console

    from saekit.commands.bench import bench as timed
    from saekit.commands.bench import show_machine, size_of
    from saekit.runs.benching import Bench

    sizes = {"sizes": tuple(map(size_of, size))} if size else {}
    architectures = {"architectures": tuple(architecture)} if architecture else {}
    asked = Bench(device=device, seconds=seconds, rows=rows, **sizes, **architectures)  # type: ignore[arg-type]
    with interruptible():
        found = timed(asked, verbose=not as_json)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    show_machine(found, Console(width=None if sys.stdout.isatty() else 1000))
