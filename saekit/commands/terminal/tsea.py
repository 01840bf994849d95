"""``saekit tsea``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["EXAMPLES", "tsea"]

EXAMPLES = """
    saekit tsea runs/RUN
    saekit tsea runs/RUN --sets first_letter --sets words.txt --features 1,2,5-20
    saekit tsea gpt2-small-res-jb:blocks.8.hook_resid_pre --regex 'ing= ?[a-z]+ing$' --random 200
"""


def tsea(
    sae: Annotated[
        str,
        typer.Argument(help="A run folder, that of an SAE of any format, or RELEASE:ID.", metavar="SAE_OR_RUN"),
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            help="first_letter, capitals, digits, punctuation, space, names, part_of_speech, or a file; several times "
            "for several. Default: all kinds but part_of_speech.",
            metavar="KIND_OR_FILE",
        ),
    ] = None,
    regex: Annotated[
        list[str] | None,
        typer.Option(
            help="A set of the tokens whose text the pattern matches from its beginning.", metavar="NAME=PATTERN"
        ),
    ] = None,
    names: Annotated[
        str | None, typer.Option(metavar="FILE", help="First names for the set names, one in each line.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="Such as 1,2,5-20, or all. Default: 100 whose logits are skewed most to the right."
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option("--random", metavar="N", help="So many features drawn from those that fire.")
    ] = None,
    skewed: Annotated[
        int | None, typer.Option("--skewed", metavar="N", help="So many whose logits are skewed most to the right.")
    ] = None,
    store: Annotated[str | None, typer.Option(metavar="FOLDER", help="A feature store: which features fire.")] = None,
    permutations: Annotated[
        int, typer.Option(help="Random orders of tokens that scores are compared with; 0: none.")
    ] = 1000,
    min_size: Annotated[int, typer.Option("--min-size", metavar="N", help="Sets of fewer tokens get no score.")] = 5,
    seed: Annotated[int, typer.Option(help="For random features and random orders.")] = 0,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the page and the tables go.")] = "tsea",
    model: Annotated[str | None, typer.Option(help="Another model than the SAE's own: a name or a folder.")] = None,
    device: Annotated[str, typer.Option(help="Where the model and the SAE are.")] = "auto",
) -> None:
    """Find which sets of tokens features promote or suppress, and draw it (token set enrichment analysis)."""
    from saekit.commands.analyzing import opened_store, token_set_enrichment
    from saekit.commands.asked import asked_features, lines_of, named_patterns
    from saekit.plugins.text import printable

    how, k = asked_features(features, random, skewed)
    found = token_set_enrichment(
        sae, sets, model=model, features=how, k=k, fractions=opened_store(store), regex=named_patterns(regex or []),
        names=None if names is None else lines_of(names), permutations=permutations, min_size=min_size, seed=seed,
        out=out, device=device,
    )  # fmt: skip
    by = ["p", "score"] if permutations else ["score"]
    table = found.table().dropna(subset=["score"]).sort_values(by, ascending=[name == "p" for name in by]).head(10)
    typer.echo(printable(table.round(4).to_string(index=False), keep="\n"))
    _tell_end(found, out)


def _tell_end(found: Any, out: str) -> None:
    """What has no score, what more random orders would tell, and where the page is."""
    from saekit.files.paths import as_path
    from saekit.plugins.text import printable

    for name, why in found.left_out.items():
        typer.echo(printable(f"no score: {name}: {why}"))
    if (least := found.at_the_floor()) is not None:
        typer.echo(f"{least} More orders (--permutations) tell them apart")
    typer.echo(f"The page is {as_path(out) / 'tsea.html'}, and the tables are beside it")
