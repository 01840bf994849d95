"""``saekit export``: ``neuronpedia``, ``delphi`` and ``list``."""

from __future__ import annotations

from typing import Annotated

import typer

from saekit.commands.terminal.arguments import examples

__all__ = ["EXAMPLES", "app"]

_NEURONPEDIA = """
    saekit export neuronpedia runs/RUN --id MODEL/LAYER-SET
    saekit export neuronpedia gpt2-features --schema bulk --folder upload
"""
_DELPHI = """
    saekit export delphi gpt2-features --module-path h.7
"""
_LIST = """
    saekit export list gpt2-small/8-res-jb --features 1,2,5-20 --name "What I looked at"
    saekit export list gpt2-small-res-jb:blocks.8.hook_resid_pre --features 1,2 --make
"""
EXAMPLES = f"{_NEURONPEDIA.rstrip()}{_DELPHI.rstrip()}{_LIST}"

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write features for Neuronpedia and delphi.")

_Where = Annotated[
    str, typer.Argument(metavar="FEATURES", help="The folder of a feature store, or the run or SAE beside which it is.")
]
_Sae = Annotated[str | None, typer.Option("--sae", metavar="NAME", help="Which SAE, of a store of several.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the export that is in the folder.")]
_Numbers = Annotated[str, typer.Option("--features", metavar="NUMBERS", help="Such as 1,2,5-20, or all.")]


@app.command("neuronpedia", epilog=examples(_NEURONPEDIA))
def neuronpedia(
    features: _Where,
    folder: Annotated[
        str | None, typer.Option(help="Where it is written; default: beside the store, its name and `-neuronpedia`.")
    ] = None,
    neuronpedia_id: Annotated[
        str | None,
        typer.Option("--id", metavar="MODEL/LAYER-SET", help="What Neuronpedia calls the SAE; default: as it says."),
    ] = None,
    schema: Annotated[
        str, typer.Option(help="saedashboard (today's batches), sae_lens_3 (those of its 3.0.0), or bulk (its import).")
    ] = "saedashboard",
    sae: _Sae = None,
    numbers: _Numbers = "all",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Features in a file.")] = 128,
    min_log_fraction: Annotated[
        float | None,
        typer.Option(
            "--min-log-fraction",
            metavar="LOG10",
            help="Features that fire on no larger fraction are skipped; default: -6, of sae_lens_3 -5.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Windows with the largest activations.")] = 20,
    quantiles: Annotated[int, typer.Option(help="Intervals of activations.")] = 5,
    per_quantile: Annotated[int, typer.Option("--per-quantile", help="Windows drawn from each.")] = 5,
    window: Annotated[
        str | None, typer.Option(metavar="BEFORE,AFTER", help="Tokens around the one shown; default: its context.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For windows that are drawn.")] = 0,
    contributions: Annotated[
        bool, typer.Option("--contributions", help="What features do at each token (sae_lens_3); it takes long.")
    ] = False,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Of SAEs of an attention's heads: from which tokens it comes (DFA).")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Another model for these than the SAE's own.")] = None,
    weights: Annotated[str | None, typer.Option(help="The SAE for these, unless FEATURES is its folder.")] = None,
    device: Annotated[str, typer.Option(help="Where they run.")] = "auto",
    creator: Annotated[str, typer.Option(help="Whose the SAE is (bulk).")] = "",
    release: Annotated[str, typer.Option(help="What its release is called (bulk).")] = "",
    description: Annotated[str, typer.Option(help="What it is (bulk).")] = "",
    url: Annotated[str, typer.Option(help="Where more is said of it (bulk).")] = "",
    overwrite: _Overwrite = False,
) -> None:
    """Write features as Neuronpedia's batches; given again, it goes on where it stopped."""
    from saekit.commands.asked import feature_numbers
    from saekit.commands.exporting import export_neuronpedia

    home = export_neuronpedia(
        features, folder=folder, neuronpedia_id=neuronpedia_id, schema=schema, sae=sae,
        numbers=feature_numbers(numbers), batch_size=batch_size, min_log_fraction=min_log_fraction, top=top,
        quantiles=quantiles, per_quantile=per_quantile, window=None if window is None else _window(window), seed=seed,
        contributions=contributions, attribution=attribution, model=model, weights=weights, device=device,
        overwrite=overwrite,
        about={"creator_name": creator, "release": release, "description": description, "url": url},
    )  # fmt: skip
    typer.echo(home)


@app.command("delphi", epilog=examples(_DELPHI))
def delphi(
    features: _Where,
    folder: Annotated[
        str | None, typer.Option(help="Where it is written; default: beside the store, its name and `-delphi`.")
    ] = None,
    module_path: Annotated[
        str | None,
        typer.Option("--module-path", metavar="PATH", help="The module in transformers, such as layers.5."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of transformers, which knows the path by the hook's name.")
    ] = None,
    sae: _Sae = None,
    n_splits: Annotated[int, typer.Option("--n-splits", help="Files, each of a range of features.")] = 5,
    overwrite: _Overwrite = False,
) -> None:
    """Write features as the cache that delphi interprets them from."""
    from saekit.commands.exporting import export_delphi

    home = export_delphi(
        features, folder=folder, module_path=module_path, model=model, sae=sae, n_splits=n_splits, overwrite=overwrite
    )
    typer.echo(home)


@app.command("list", epilog=examples(_LIST))
def quick_list(
    sae: Annotated[
        str,
        typer.Argument(
            metavar="ID_OR_SAE", help="MODEL/LAYER-SET, RELEASE:ID, or a feature store or run whose SAE says it."
        ),
    ],
    numbers: Annotated[str, typer.Option("--features", metavar="NUMBERS", help="Such as 1,2,5-20.")],
    neuronpedia_id: Annotated[
        str | None, typer.Option("--id", metavar="MODEL/LAYER-SET", help="What Neuronpedia calls the SAE of a store.")
    ] = None,
    which: _Sae = None,
    name: Annotated[str, typer.Option(help="What the list is called.")] = "features",
    make: Annotated[
        bool, typer.Option("--make", help="Have Neuronpedia keep it, by the API key in NEURONPEDIA_API_KEY.")
    ] = False,
    description: Annotated[str, typer.Option(help="Of a list that is kept.")] = "",
) -> None:
    """Show the address of a list of features at Neuronpedia."""
    from saekit.commands.asked import feature_numbers
    from saekit.commands.exporting import name_of
    from saekit.errors import ConfigError
    from saekit.exports.lists import make_list
    from saekit.exports.naming import quick_list_url

    found = feature_numbers(numbers)
    if isinstance(found, str):
        raise ConfigError([("features", "must be numbers, such as 1,2,5-20, for a list of all is none")])
    one = name_of(sae, which, neuronpedia_id)
    typer.echo(make_list(one, found, name, description=description) if make else quick_list_url(one, found, name))


def _window(text: str) -> tuple[int, int]:
    from saekit.errors import ConfigError

    before, comma, after = (part.strip() for part in text.partition(","))
    if not comma or not before.isdecimal() or not after.isdecimal():
        raise ConfigError([("window", f"must be two whole numbers, such as 5,5, found {text!r}")])
    return int(before), int(after)
