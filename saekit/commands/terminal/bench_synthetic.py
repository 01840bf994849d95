"""``saekit bench-synthetic``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from saekit.commands.terminal.arguments import completed
from saekit.commands.terminal.ending import interruptible

__all__ = ["EXAMPLES", "bench_synthetic"]

EXAMPLES = """
    saekit bench-synthetic
    saekit bench-synthetic topk batchtopk --seeds 3
    saekit bench-synthetic standard --l0 2,1,4,8 --superposition 2 --correlated 0 --json
"""
_NUMBERS = "Numbers with commas between; the first stays while another axis changes."


def bench_synthetic(
    architectures: Annotated[
        list[str] | None,
        typer.Argument(
            help="Architectures to try; none: every one that trains on one site.",
            autocompletion=lambda ctx, incomplete: completed("complete_architecture", ctx, incomplete),
        ),
    ] = None,
    l0: Annotated[str, typer.Option(help=f"True features that fire in a row. {_NUMBERS}")] = "2,1,4",
    correlated: Annotated[str, typer.Option(help=f"Share of features in correlated pairs. {_NUMBERS}")] = "0,0.5,1",
    superposition: Annotated[str, typer.Option(help=f"True features per dimension. {_NUMBERS}")] = "2,1,4",
    hidden: Annotated[int, typer.Option(help="Dimensions of the hidden layer.")] = 20,
    steps: Annotated[int, typer.Option(help="Steps of each SAE.")] = 300,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = 3e-3,
    seeds: Annotated[int, typer.Option(help="How often all is trained, with other seeds.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    folder: Annotated[str, typer.Option(help="Where the numbers, the picture and the page go.")] = "saekit-synthetic",
    as_json: Annotated[bool, typer.Option("--json", help="For programs: the numbers instead of the table.")] = False,
) -> None:
    """Measure how well each architecture finds known features, as sparsity, correlation and superposition grow."""
    from rich.console import Console

    from saekit.commands.bench_synthetic import bench_synthetic as benched
    from saekit.commands.bench_synthetic import show_bench
    from saekit.toy.synthetic import SyntheticBench

    bench = SyntheticBench(
        architectures=tuple(architectures or ()), l0=_numbers("--l0", l0),
        correlated=_numbers("--correlated", correlated), superposition=_numbers("--superposition", superposition),
        n_hidden=hidden, steps=steps, lr=lr, seeds=seeds, seed=seed,
    )  # fmt: skip
    with interruptible():
        result = benched(bench, folder, verbose=not as_json)
    if as_json:
        typer.echo(json.dumps({"rows": list(result.rows), "left_out": dict(result.left_out)}, indent=1))
        return
    show_bench(result, Console(width=None if sys.stdout.isatty() else 1000))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from saekit.errors import ConfigError

    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} takes numbers with commas between, such as 2,1,4; found {text!r}") from None
