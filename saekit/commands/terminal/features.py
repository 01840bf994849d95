"""``saekit features``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

__all__ = ["EXAMPLES", "features"]

EXAMPLES = """
    saekit features runs/RUN
    saekit features runs/A runs/B --features 1,2,5-20 --folder both
    saekit features gpt2-small-res-jb:blocks.8.hook_resid_pre --dataset OWNER/NAME --folder gpt2-features
"""

_Contexts = Annotated[int, typer.Option("--n-contexts", help="Contexts to look at.")]
_Size = Annotated[int | None, typer.Option("--context-size", help="Tokens in each; default: the SAE's.")]


def features(
    saes: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, those of SAEs of any format, or RELEASE:ID; all of one model.", metavar="SAE_OR_RUN..."
        ),
    ],
    numbers: Annotated[
        str, typer.Option("--features", metavar="NUMBERS", help="Features of each SAE, such as 1,2,5-20, or all.")
    ] = "all",
    folder: Annotated[
        str | None, typer.Option(help="Where the features are kept; default: `features` beside the SAE.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the SAE's own: a name or a folder.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another text than what was held out from training: a path or OWNER/NAME.")
    ] = None,
    n_contexts: _Contexts = 1024,
    context_size: _Size = None,
    max_per_feature: Annotated[
        int,
        typer.Option(
            "--max-per-feature",
            metavar="N",
            help="Activations of a feature that are kept; of one with more a fair sample, and the largest.",
        ),
    ] = 100_000,
    partners: Annotated[
        int, typer.Option(metavar="K", help="Features and neurons that are kept of those that fire with each.")
    ] = 20,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Contexts in a forward of the model.")] = 32,
    exclude_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--exclude-special-tokens/--include-special-tokens",
            help="Whether special tokens count; default: as in training.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice among held-out contexts, and for samples.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model and the SAEs run.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the features that are kept in the folder.")
    ] = False,
) -> None:
    """Collect what features do on text, in one pass, for pages, tables and exports; given again, it goes on."""
    from saekit.commands.asked import feature_numbers
    from saekit.commands.features import collect_features

    store = collect_features(
        saes, model=model, dataset=None if dataset is None else {"path": dataset}, features=feature_numbers(numbers),
        n_contexts=n_contexts, context_size=context_size, folder=folder, max_per_feature=max_per_feature,
        partners=partners, batch_size=batch_size, exclude_special_tokens=exclude_special_tokens, seed=seed,
        device=device, overwrite=overwrite,
    )  # fmt: skip
    for one in store.saes.values():
        dead = len(one.dead)
        typer.echo(f"{one.name}: {len(one):,} features on {one.tokens_counted:,} tokens, {dead:,} of which never fire")
    typer.echo(f"kept in {store.folder}")
    typer.echo(f"next: saekit dashboard {shlex.quote(str(store.folder))}")
