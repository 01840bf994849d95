"""``saekit statistics``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["EXAMPLES", "statistics"]

EXAMPLES = """
    saekit statistics runs/RUN
    saekit statistics runs/SWEEP --out statistics.parquet
    saekit statistics runs/RUN/features
    saekit statistics gpt2-small-res-jb:blocks.8.hook_resid_pre --no-logits
"""


def statistics(
    saes: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, sweeps', those of SAEs of any format, or RELEASE:ID; or a feature store.",
            metavar="SAE_OR_RUN...",
        ),
    ],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table there, as .parquet or .csv.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the SAE's own: a name or a folder.")] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Tell how logits are distributed, which needs the model.")
    ] = True,
    store: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A feature store, by whose text it is told how often each fires."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model and the SAEs are.")] = "auto",
) -> None:
    """Tell of every feature how often it fires, how its weights lie, and how its logits are distributed."""
    from saekit.commands.analyzing import feature_statistics, opened_store, table_place, write_table
    from saekit.commands.summaries import summary_of
    from saekit.plugins.text import printable

    if out is not None:
        table_place(out)
    found = feature_statistics(saes, model=model, fractions=opened_store(store), logits=logits, device=device)
    if out is not None:
        typer.echo(f"{len(found):,} features are in {write_table(found, out)}")
    else:
        for line in summary_of(found):
            typer.echo(printable(line, keep="\n"))
        typer.echo("--out statistics.parquet writes a row for each")
    for name, why in found.attrs["left_out"].items():
        for reason in dict.fromkeys(why.values()):
            columns = ", ".join(column for column in why if why[column] == reason)
            typer.echo(printable(f"{name}: no {columns}: {reason}"))
