"""``saekit compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from saekit.commands.terminal.measuring import (
    Backend,
    Contexts,
    ContextSize,
    Dataset,
    Device,
    Evals,
    Excluded,
    Model,
    Places,
    Seed,
    Where,
    evals_of,
    places_of,
)

__all__ = ["EXAMPLES", "compare"]

EXAMPLES = """
    saekit compare runs/A runs/B
    saekit compare runs/SWEEP --n-contexts 256 --out comparison
    saekit compare gpt2-small-res-jb:blocks.8.hook_resid_pre runs/A --dataset OWNER/NAME
"""


def compare(
    saes: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: run folders, sweeps', those of SAEs of any format, or RELEASE:ID.",
            metavar="SAE_OR_RUN...",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write compare.json, compare.png and compare.html there.")
    ] = None,
    model: Model = None,
    backend: Backend = None,
    dataset: Dataset = None,
    n_contexts: Contexts = 64,
    context_size: ContextSize = None,
    evals: Evals = None,
    site: Where = None,
    kl: Annotated[bool, typer.Option("--kl", help="Compare the KL divergence from the model as it is, too.")] = False,
    top1: Annotated[
        bool, typer.Option("--top1", help="Compare how often the likeliest token stays the same, too.")
    ] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Say of each two of several what can be told.")] = False,
    exclude_special_tokens: Excluded = None,
    seqpos_slice: Places = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare SAEs of one model on the same contexts: differences, intervals, and whether they can be told apart."""
    import json

    from saekit.commands.comparing import compare as compared
    from saekit.plugins.text import printable

    found = compared(
        saes, out=out, model=model, backend=backend, site=site, seqpos_slice=places_of(seqpos_slice),
        dataset=None if dataset is None else {"path": dataset}, n_contexts=n_contexts,
        context_size=context_size, evals=evals_of(evals), kl=kl or None, top1=top1 or None,
        exclude_special_tokens=exclude_special_tokens, seed=seed, device=device,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        typer.echo(printable(found.text(pairs=pairs), keep="\n"))
